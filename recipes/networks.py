"""A network of one's own for the recipes: what stands beside a YAML file is found by its name, `recipes.networks.<name>`."""

from torch import nn


def handcrafted_cnn(channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """The convolutional network for MNIST and Fashion-MNIST of arXiv 2007.14191, with ReLU.

    Layer details are those of the public re-implementation (Tramèr and Boneh 2021, arXiv 2011.11660); 26,010 parameters for
    images `(batch, 1, 28, 28)`.

    Args:
        channels: of the images.
        num_classes: number of logits.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )
