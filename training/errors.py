"""The exceptions a user's input can cause."""


class UserError(Exception):
    """Bad input, told in one sentence that names the file or argument and the way out.

    The command line prints the message alone and exits with status 2.
    """


class DivergedError(UserError):
    """A training whose loss stopped being finite. Other runs of a comparison are not concerned."""
