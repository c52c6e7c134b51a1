"""Where pictures come from: sources (`pipelines.units`) whose units hold images, and how an image becomes tokens.

    digits         the 8 x 8 handwritten digits that ship with scikit-learn: 1,797 of them, 17 grey levels
    idx            the files of MNIST and its relatives, *-images-idx3-ubyte with *-labels-idx1-ubyte, or these as .gz
    cifar          CIFAR-10 or CIFAR-100 in the "binary version"
    npz            the .npz batches of downsampled ImageNet
    images         a folder of image files; the folders below it are the classes
    webdataset     a tar, or a folder of them: an image and a .cls (or .json with "label") for each sample
    image-parquet  a parquet file, or a folder of them: a column of image bytes (as the Hugging Face hub writes them)

`arrays` and `npz` read the first four, which hold bare pixels, `files` and `tars` the others, which hold image files;
`tokens` makes tokens of both, and `sources` is what they look like from outside.

An image has the shape [H, W, C] with one token for each number of a pixel, row by row, the channels of a pixel side by
side. A source that has a test or validation set of its own says so in the names of its files or of its topmost folders
(train, test, val...), and that set stays what it is.
"""

from pipelines.images.records import NO_LABEL
from pipelines.images.sources import EXAMPLES, KINDS, SHAPES, Images, digest, open_source, read, read_bytes, read_file
from pipelines.images.tokens import Recipe, brightness, native_levels

__all__ = [
    "EXAMPLES",
    "KINDS",
    "NO_LABEL",
    "SHAPES",
    "Images",
    "Recipe",
    "brightness",
    "digest",
    "native_levels",
    "open_source",
    "read",
    "read_bytes",
    "read_file",
]
