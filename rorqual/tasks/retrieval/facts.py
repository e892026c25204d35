"""A made-up collection, the same on every machine: one number a page, for tasks that can't be answered without looking.

The number is a digest's, so that nothing but the page tells it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from rorqual.tasks.retrieval.document import Document

NAME = "facts"
NOUNS = ("lamp", "boat", "tree", "shop", "book", "cup", "horse", "door", "train", "clock", "stone", "field")
FIELDS = ("size", "price", "age", "weight")
NAMES = (
    "amber", "apple", "arrow", "birch", "bridge", "cabin", "canyon", "castle", "cedar", "cherry", "comet", "copper", "coral",
    "cotton", "crystal", "delta", "desert", "diamond", "eagle", "ember", "falcon", "feather", "flint", "forest", "galaxy",
    "garden", "ginger", "granite", "hammer", "harbor", "hazel", "honey", "iris", "island", "ivory", "jade", "jungle",
    "kettle", "lantern", "lemon", "lilac", "lion", "lotus", "mango", "maple", "marble", "meadow", "melon", "mirror", "moss",
    "mountain", "needle", "oak", "oasis", "ocean", "olive", "onyx", "opal", "orange", "orchid", "panther", "pearl", "pepper",
    "pine", "planet", "plum", "prairie", "quartz", "rabbit", "raven", "reef", "ribbon", "river", "robin", "rocket", "rose",
    "ruby", "sage", "salmon", "shadow", "shell", "silk", "silver", "spark", "spruce", "star", "storm", "sugar", "summit",
    "temple", "thunder", "tiger", "tower", "tulip", "turtle", "velvet", "walnut", "willow", "winter", "wolf", "zebra",
)  # fmt: skip


def fact(name: str, noun: str, field: str) -> Document:
    """The page about one field of one thing: its title asks, its text is a number of two digits."""
    title = f"{name} {noun} {field}"
    number = 10 + int.from_bytes(hashlib.sha256(title.encode()).digest()[:4], "big") % 90
    return Document(f"https://facts.example/{name}/{noun}/{field}", title, str(number))


def pages() -> Iterator[Document]:
    for name in NAMES:
        for noun in NOUNS:
            for field in FIELDS:
                yield fact(name, noun, field)
