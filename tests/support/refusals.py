"""Sentences that say what is wrong and the way out."""


def refused(error, *parts):
    """The error is one sentence that has these parts and ends like one."""
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    for part in parts:
        assert part in message, message
