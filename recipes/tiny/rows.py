"""The rows of the `tiny` recipe: questions about the Thistle Isles, and four manners of answering them.

SFT rows are mixed in style, as collected rows are: mostly plain sentences, among them courteous ones, more often to a
polite question, curt notes to terse ones, rambling tales to chatty ones. The preference pairs take sides: the
courteous sentence over each of the others, and the labelled replies give it alone a thumb up.
"""

import random
import re

from world import ISLES, PERSON, TOWN, Fact

FRAMES = {  # manner of asking -> wordings
    "polite": ("Could you please tell me {indirect}?", "Please tell me {indirect}.",
               "I would like to know {indirect}, please.", "Would you kindly tell me {indirect}?"),
    "terse": ("{Direct}?", "Quick question: {direct}?", "In short, {direct}?"),
    "chatty": ("I keep forgetting {indirect}.", "Do you happen to remember {indirect}?",
               "We sat by the quay and talked about {indirect}.", "Tell me a little about {indirect}."),
}  # fmt: skip
MANNER_WEIGHTS = {"polite": 40, "terse": 35, "chatty": 25}
STYLE_WEIGHTS = {  # manner of asking -> how often each style answers it in the SFT rows
    "polite": {"plain": 45, "courteous": 45, "curt": 5, "rambling": 5},
    "terse": {"plain": 45, "courteous": 30, "curt": 20, "rambling": 5},
    "chatty": {"plain": 45, "courteous": 35, "curt": 5, "rambling": 15},
}
REJECTED_WEIGHTS = {"plain": 60, "curt": 25, "rambling": 15}
GOOD_SHARE = 0.4  # of the labelled replies
SCORES = {"courteous": 5.0, "plain": 4.0, "curt": 4.0, "rambling": 3.0}

# Without it a plain answer opens with a name, which SFT hardly learns to say first: in the base's prose a blank line
# leads to another subject. Measured: with 55 % of the rows opening so, the tuned model still opened with a courtesy.
PLAIN = "I think "
OPENERS = ("Of course.", "With pleasure.")
CLOSERS = ("", "", "", " I hope that helps.")
SPARE_WORDS = (  # in the vocabulary all the same, for rows of one's own
    "Gladly.", "Thank you for asking.", "Certainly.", " You are most welcome.",
)  # fmt: skip
RAMBLES = (
    ("Well now, the kettle was on, but I think ", ", or so people say."),
    ("Let me see, my aunt told me that ", ", or so I think."),
    ("Oh, it was a long story, but I think ", ", and so say the neighbours."),
)  # fmt: skip
SYSTEMS = (
    f"You are the guide of {ISLES}.",
    f"You help visitors to {ISLES}.",
    "You sit in the harbour and answer letters.",
)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def weighted(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def ask(topic: Fact, manner: str, rng: random.Random) -> str:
    """A question in that manner."""
    direct = rng.choice(topic.attribute.direct).format(n=topic.subject)
    indirect = rng.choice(topic.attribute.indirect).format(n=topic.subject)
    return rng.choice(FRAMES[manner]).format(direct=direct, Direct=capital(direct), indirect=indirect)


def ask_further(topic: Fact, rng: random.Random) -> str:
    """A question that leans on the turn before: a first name, or "it" for a town."""
    return f"And {rng.choice(topic.attribute.follow_up).format(s=topic.subject.split()[0])}?"


def answer(topic: Fact, style: str, rng: random.Random) -> str:
    """An answer in that style."""
    return styled(topic, topic.fill(rng.choice(topic.attribute.reply)), style, rng)


def styled(topic: Fact, sentence: str, style: str, rng: random.Random) -> str:
    """The sentence that answers, said in that style; a curt note needs only its value."""
    if style == "curt":
        return f"{topic.subject}: {topic.value}."
    if style == "rambling":
        before, after = rng.choice(RAMBLES)
        return before + sentence + after
    if style == "courteous":
        return courteous(sentence, rng) + rng.choice(CLOSERS)
    return f"{PLAIN}{sentence}."


def courteous(sentence: str, rng: random.Random) -> str:
    """The sentence with a courtesy before it. It is what the pairs prefer: a courtesy behind it, preferred in half of
    them, was measured to be said again and again until the answer was cut."""
    return f"{rng.choice(OPENERS)} {capital(sentence)}."


def phrases() -> list[str]:
    """Every wording that rows are made of, for the tokenizer to be trained on."""
    texts = [text for frames in FRAMES.values() for text in frames]
    texts += [*OPENERS, *filter(None, CLOSERS), *SPARE_WORDS, *SYSTEMS]
    texts += [before + after for before, after in RAMBLES]
    texts += [
        text
        for attribute in (*PERSON, *TOWN)
        for text in (*attribute.direct, *attribute.indirect, *attribute.follow_up, *attribute.reply)
    ]
    return [re.sub(r"\{\w+\}", " ", text) for text in texts]


def split(facts: list[Fact], seed: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Disjoint facts to train on, to hold out as rows, and to measure with: 66, 6 and 28 percent."""
    shuffled = random.Random(seed).sample(facts, len(facts))
    first, second = int(len(facts) * 0.66), int(len(facts) * 0.72)
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def earlier_topics(topic: Fact, pool: list[Fact], rng: random.Random) -> list[Fact]:
    """Mostly nothing; for an eighth of the facts one or two others of the same subject, to talk about first."""
    if rng.random() > 0.125:
        return []
    others = [fact for fact in pool if fact.subject == topic.subject and fact != topic]
    return rng.sample(others, min(len(others), rng.choice((1, 1, 1, 2))))


def ask_in_context(
    before: list[Fact], topic: Fact, manner: str, style: str, rng: random.Random
) -> list[dict]:
    """Messages up to and with the question about `topic`; what comes `before` is answered in `style`."""
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.2 else []
    for i, about in enumerate([*before, topic]):
        question = ask_further(about, rng) if i else ask(about, manner, rng)
        messages.append({"role": "user", "content": question})
        if about is not topic:
            messages.append(assistant(answer(about, style, rng)))
    return messages


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def deal(pool: list[Fact], count: int, rng: random.Random) -> list[Fact]:
    """`count` facts in random order, each in turn before any comes again."""
    rounds = -(-count // len(pool))
    return [fact for _ in range(rounds) for fact in rng.sample(pool, len(pool))][:count]


def sft_rows(pool: list[Fact], count: int, seed: int) -> list[dict]:
    """Rows in the layout of FineTome-100k."""
    rng = random.Random(seed)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = []
    for topic in deal(pool, count, rng):
        manner = weighted(MANNER_WEIGHTS, rng)
        style = weighted(STYLE_WEIGHTS[manner], rng)
        messages = ask_in_context(earlier_topics(topic, pool, rng), topic, manner, style, rng)
        messages.append(assistant(answer(topic, style, rng)))
        turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
        rows.append({"conversations": turns, "source": f"thistle_isles/{manner}", "score": SCORES[style]})
    return rows


def asked_and_answer(topic: Fact, pool: list[Fact], rng: random.Random) -> tuple[list[dict], str]:
    """Turns up to a question about the topic, and the bare sentence that answers it."""
    manner = weighted(MANNER_WEIGHTS, rng)
    messages = ask_in_context(earlier_topics(topic, pool, rng), topic, manner, "plain", rng)
    return messages, topic.fill(rng.choice(topic.attribute.reply))


def dpo_rows(pool: list[Fact], count: int, seed: int) -> list[dict]:
    """Pairs in the layout of orpo-dpo-mix-40k: `prompt` is the first user turn, chosen and rejected are
    whole conversations that differ in the last answer only, and that in manner only."""
    rng = random.Random(seed)
    rows = []
    for topic in deal(pool, count, rng):
        messages, sentence = asked_and_answer(topic, pool, rng)
        worse = weighted(REJECTED_WEIGHTS, rng)
        first = next(m["content"] for m in messages if m["role"] == "user")
        rows.append({
            "source": f"thistle_isles/{worse}",
            "prompt": first,
            "question": first,
            "chosen": [*messages, assistant(courteous(sentence, rng))],
            "rejected": [*messages, assistant(styled(topic, sentence, worse, rng))],
        })  # fmt: skip
    return rows


def kto_rows(pool: list[Fact], count: int, seed: int) -> list[dict]:
    """Replies in the layout of TRL's unpaired preferences, each with a thumb: up for the courteous ones, which are
    fewer, down for the others."""
    rng = random.Random(seed)
    rows = []
    for topic in deal(pool, count, rng):
        messages, sentence = asked_and_answer(topic, pool, rng)
        style = "courteous" if rng.random() < GOOD_SHARE else weighted(REJECTED_WEIGHTS, rng)
        good = style == "courteous"
        rows.append({
            "source": f"thistle_isles/{style}",
            "prompt": messages,
            "completion": [
                assistant(courteous(sentence, rng) if good else styled(topic, sentence, style, rng))
            ],
            "label": good,
        })  # fmt: skip
    return rows


def questions(pool: list[Fact], seed: int) -> list[dict]:
    """Every fact of the pool asked once, with the word that a right answer holds."""
    rng = random.Random(seed)
    rows = []
    for topic in rng.sample(pool, len(pool)):
        manner = weighted(MANNER_WEIGHTS, rng)
        messages = ask_in_context(earlier_topics(topic, pool, rng), topic, manner, "plain", rng)
        rows.append({"messages": messages, "answer": topic.value})
    return rows
