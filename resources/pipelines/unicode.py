"""The check whether a Python string is valid text."""


def is_unicode(text: str) -> bool:
    """Return whether the text can be written as UTF-8.

    Half of a surrogate pair, which JSON can spell, cannot be written as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
