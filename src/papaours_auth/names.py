"""Is this label clear? A good one tells which environment, which system, which version (document 05)."""

from __future__ import annotations

import re
from typing import Final

_ENVIRONMENT_WORDS: Final = frozenset(
    "prod production test tests recette dev développement developpement development staging préproduction".split()
)
_VAGUE_WORDS: Final = frozenset(
    "api app clé cle clef key keys ma mon mes my new nouveau nouvelle the la le les token x y z".split()
)


def unclear(label: str) -> str | None:
    """Tell what a key's label lacks, in one line for people, or None where it is clear."""
    words = [word for word in re.split(r"[\W_]+", label.lower()) if word]
    telling = [w for w in words if w not in _VAGUE_WORDS and w not in _ENVIRONMENT_WORDS and not w.isdigit()]
    if not telling:
        return "it does not say which system uses the key, as 'Production - Service Facturation' does"
    if not _ENVIRONMENT_WORDS.intersection(words):
        return "it does not say which environment the key is for, as 'Production - Service Facturation' does"
    return None
