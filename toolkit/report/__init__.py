"""The pages that a person opens: the report of a run, the preview of its rows."""
