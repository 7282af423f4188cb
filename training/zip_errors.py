"""What Python's zipfile raises for a damaged file, besides an OSError."""

import lzma
import zipfile
import zlib

DAMAGED_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unknown compression, or a newer version of the format
    ValueError,  # an offset before the start of the file
)
