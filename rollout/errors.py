"""The error a person can act on."""


class UserError(Exception):
    """Something the user can mend: the message names what is wrong, where, and what to do; shown without a traceback."""
