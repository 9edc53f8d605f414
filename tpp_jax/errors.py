"""The one exception that stands for a mistake in how the library is used."""


class TPPError(ValueError):
    """An error of the user's making, such as a wrong name, pattern or folder.

    Its message is one or two sentences that name the thing at fault and the mend.
    `launch.py` prints that message alone; everything else that is raised is a defect
    of this library and keeps its traceback.
    """
