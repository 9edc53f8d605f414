"""Exceptions for mistakes in the use of the library."""


class TPPError(ValueError):
    """A mistake of the user, such as a wrong name, pattern or folder.

    The message is one or two sentences that name the cause and the fix. `launch.py`
    prints only that message; any other exception is a defect of this library and keeps
    its traceback.
    """


class TPPTypeError(TPPError, TypeError):
    """A :class:`TPPError` about an argument that has the wrong type or is missing."""
