"""What is text."""


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; half of a surrogate pair, which JSON can spell, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
