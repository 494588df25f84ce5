"""Errors that a user can fix: what was got, the limit, the fix. `cli` turns them into exit code 2."""

# How one gets what requirements-optional.txt holds: TensorBoard, W&B, lm_eval; and what quantises for servers
INSTALL_OPTIONAL = (
    "`make optional`, or without make `pip install -c requirements.txt -r requirements-optional.txt`"
)
INSTALL_QUANTISE = "`make optional`, or without make `pip install --no-deps -r requirements-quantise.txt`"


class UserError(Exception):
    """One or more problems found together; each names what was got, what is allowed and the fix.

    Raised from every floor, shown without a traceback. Anything else that escapes is an internal error.
    """

    def __init__(self, *problems: str):
        if not problems:
            raise ValueError("UserError needs at least one problem")
        super().__init__("\n".join(problems))
        self.problems = problems


class Interrupted(BaseException):
    """A run was asked to stop by a signal and has saved what it had; `cli` exits with 128 + `signal`.

    Like KeyboardInterrupt no Exception: it comes in the middle of library code, which catches those.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


class EndedByAnother(UserError):
    """Another of the processes that train a run together ended it, and has said why; this one ends with its `code`."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def exit_code(error: BaseException) -> int:
    """0 done, 2 the user can fix it, 128 + signal stopped, 1 a fault."""
    if isinstance(error, EndedByAnother):
        return error.code
    if isinstance(error, UserError):
        return EXIT_USER
    if isinstance(error, Interrupted):
        return 128 + error.signal
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAULT


def outcome_of(code: int) -> str:
    """How a process with that exit code ended, in the words of manifest, report and --on-finish."""
    return "finished" if not code else "interrupted" if code > 128 else "failed"
