"""Words of errors that others raise."""


def first_line(error: BaseException) -> str:
    """What an error says, without what is below it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
