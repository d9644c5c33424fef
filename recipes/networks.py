"""A network of one's own for the recipes: what stands beside a YAML file is found by its name, `recipes.networks.<name>`."""

from itertools import pairwise

import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe.routing import ExpertGate


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


def mlp(inputs: int, hidden: int, layers: int = 2, outputs: int = 10) -> nn.Sequential:
    """A plain network of dense layers with ReLU, for images or rows of numbers.

    Args:
        inputs: numbers of a sample.
        hidden: units of a hidden layer.
        layers: hidden layers.
        outputs: number of logits.
    """
    widths = [inputs, *[hidden] * layers]
    parts = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *parts, nn.Linear(hidden, outputs))


def small_cnn(channels: int = 1, size: int = 28, num_classes: int = 10, width: int = 32, hidden: int = 256) -> nn.Sequential:
    """Two convolutions with ReLU and pooling, and a hidden dense layer.

    Args:
        channels: of the images.
        size: their side in pixels, a multiple of 4.
        num_classes: number of logits.
        width: channels of the first convolution; the second has twice as many.
        hidden: units of the dense layer.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


class MultiTaskCNN(nn.Module):
    """Shared convolutional experts under one gate a task, for overlaid images.

    Images `(batch, channels, h, w)` to `(batch, tasks, features)`.

    Args:
        gate: a gate made for all tasks (`tasks=n`); with a `dim` it looks at the flattened image.
        features: what an expert gives.
        channels: of the images.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, gate: ExpertGate, features: int = 64, channels: int = 1, width: int = 8) -> None:
        super().__init__()

        def expert() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(channels, width, 5, stride=2),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(4),
                nn.Flatten(),
                nn.Linear(32 * width, features),
                nn.ReLU(),
            )

        self.moe = gp.MultiGateMoE([expert() for _ in range(gate.experts)], gate)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run the experts that a task wants."""
        return self.moe(pixel_values, route=pixel_values.flatten(1))


class RatingNet(nn.Module):
    """Embeddings of user and movie, side by side, through experts under one gate a task.

    Numbers of users and of movies, `(batch,)` each, to `(batch, tasks, features)`.

    Args:
        users: number of users.
        movies: number of movies.
        gate: a gate made for all tasks (`tasks=n`); its `dim`, if any, is 2 · `dim`.
        dim: width of an embedding.
        hidden: width of an expert's hidden layer.
        features: what an expert gives.
        unknown: share of the users and movies of a training batch that are taken for new ones, whose embedding is zero: in a
            test set that comes later, many are.
    """

    def __init__(
        self, users: int, movies: int, gate: ExpertGate, dim: int = 32, hidden: int = 64, features: int = 32, unknown: float = 0.2
    ) -> None:
        super().__init__()
        self.users, self.movies = nn.Embedding(users, dim), nn.Embedding(movies, dim)
        for table in (self.users, self.movies):
            nn.init.zeros_(table.weight)
        self.unknown = unknown
        self.moe = gp.MultiGateMoE(gp.ExpertMLP(gate.experts, 2 * dim, hidden, out_dim=features), gate)

    def forward(self, user: Tensor, movie: Tensor) -> Tensor:
        """Run the experts on the pairs."""
        parts = [self.users(user), self.movies(movie)]
        if self.training:
            parts = [part * (torch.rand(len(part), 1, device=part.device) >= self.unknown) for part in parts]
        return self.moe(torch.cat(parts, -1))
