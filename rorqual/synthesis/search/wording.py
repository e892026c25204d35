"""Questions in words: one phrase per kind of clause and language. The corpus itself stays in its own language."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rorqual.synthesis.search.relations import Clause

OPEN = {
    "en": "Which entry of the collection fulfils all of this: {clauses}? Give its short name.",
    "de": "Welcher Eintrag der Sammlung erfüllt all dies: {clauses}? Nenne seinen Kurznamen.",
    "fr": "Quelle entrée de la collection remplit toutes ces conditions : {clauses} ? Donne son nom court.",
    "es": "¿Qué entrada de la colección cumple todo esto: {clauses}? Da su nombre corto.",
}
PHRASES = {
    "Section": {"en": "it is filed under {v}", "de": "er ist unter {v} eingeordnet", "fr": "elle est classée dans {v}",
                "es": "está clasificada en {v}"},
    "Maintainer": {"en": "{v} looks after it", "de": "{v} betreut ihn", "fr": "{v} s'en occupe", "es": "{v} la mantiene"},
    "word": {"en": "its summary uses the word {v!r}", "de": "seine Zusammenfassung enthält {v!r}",
             "fr": "son résumé contient le mot {v!r}", "es": "su resumen contiene la palabra {v!r}"},
    "Tag": {"en": "{facet} for it is {v}", "de": "{facet} ist bei ihm {v}", "fr": "{facet} y est {v}",
            "es": "{facet} en ella es {v}"},
    "Depends": {"en": "it needs {v}", "de": "er benötigt {v}", "fr": "elle nécessite {v}", "es": "necesita {v}"},
    "": {"en": "its {field} is {v}", "de": "sein Feld {field} lautet {v}", "fr": "son champ {field} est {v}",
         "es": "su campo {field} es {v}"},
}  # fmt: skip
HOP = {
    "en": "it needs another entry of which this holds ({inner})",
    "de": "er benötigt einen anderen Eintrag, für den gilt ({inner})",
    "fr": "elle nécessite une autre entrée pour laquelle ({inner})",
    "es": "necesita otra entrada de la que se cumple ({inner})",
}
AND = {"en": " and ", "de": " und ", "fr": " et ", "es": " y "}


def phrase(clause: Clause, language: str) -> str:
    if "of" in clause:
        return HOP[language].format(inner=AND[language].join(phrase(inner, language) for inner in clause["of"]))
    field, value = clause["field"], clause["value"]
    facet, _, plain = value.partition("::")
    shown = plain.replace("-", " ") if field == "Tag" and plain else value
    return PHRASES.get(field, PHRASES[""])[language].format(v=shown, facet=facet, field=field)


def write(clauses: Sequence[Clause], language: str, rng: random.Random) -> str:
    """The question, its clauses in a random order."""
    said = [phrase(clause, language) for clause in clauses]
    rng.shuffle(said)
    return OPEN[language].format(clauses="; ".join(said))
