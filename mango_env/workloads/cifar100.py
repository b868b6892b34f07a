"""CIFAR-100 from `$MANGO_DATA`: the images of `cifar100_resnet`, in files of the layout of CIFAR-10's."""

from mango_env.workloads.cifar10 import load_cifar
from mango_env.workloads.data import ImageData, check_positive, data_file

SOURCE = (
    "Get cifar-100-python.tar.gz from cs.toronto.edu/~kriz/cifar.html, unpack it, and make both files by "
    "python -m mango_env.workloads.convert_cifar100 cifar-100-python FOLDER (numpy.savez of jpeg, offsets, y)"
)
CLASSES = 100
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)                 # of the training set, by channel, of levels 0..1


def cifar100_images(reader: str, val_size: int) -> ImageData:
    """All training images and the first `val_size` test images, for the workload `reader`."""
    check_positive(val_size=val_size)
    train, test = (data_file(f"cifar100_{part}_jpeg.npz", reader, SOURCE) for part in ("train", "test"))
    return load_cifar(train, test, val_size, MEAN, STD, CLASSES)
