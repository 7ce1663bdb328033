"""The errors that a user can cause.

UserError           anything that wrong input, a wrong option or a damaged file can bring about
├── CacheError      the cache on disk: missing, foreign, damaged, or not what was asked for
└── ImageError      an image tar or a picture in it that cannot be read as it claims

The commands print a `UserError` as one red line and exit with code 1; every other exception is a
defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can put right; the message says what, expected, found and how."""


class CacheError(UserError):
    """A feature cache that is missing, damaged, foreign or does not hold what was asked for."""


class ImageError(UserError):
    """An image tar, or a picture in one, that cannot be read as it claims."""
