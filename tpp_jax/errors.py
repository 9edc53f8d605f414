"""The exceptions that stand for a mistake in how the library is used."""


class TPPError(ValueError):
    """An error of the user's making, such as a wrong name, pattern or folder.

    Its message is one or two sentences that name the thing at fault and the fix.
    `launch.py` prints that message alone; everything else that is raised is a defect
    of this library and keeps its traceback.
    """


class TPPTypeError(TPPError, TypeError):
    """A :class:`TPPError` about an argument of a wrong type, or one that is missing."""
