"""YAML out and in, by PyYAML, held to YAML 1.2 as Compose's own parser reads it.

PyYAML speaks YAML 1.1, where ``on`` is true and ``22:22`` is 1342. Out: a text is plain only when no YAML would read it
as anything else, and JSON-quoted otherwise. In: the core schema of 1.2, bounded in size, depth and aliases.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from slum.errors import ConfigError

BYTES_MAX = 1 << 20
DEPTH_MAX = 64
ALIASES_MAX = 1000

_Base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.@+-]*(?::[A-Za-z0-9_/.@+-]+)*")
_NOT_TEXT = re.compile(
    r"(?:y|n|yes|no|on|off|true|false|null|nan|inf|[-+.0-9].*[0-9].*|\.|\.inf|\.nan|\.\.?)", re.IGNORECASE
)
_OUT_OF_YAML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


class _Dumper(_Base):  # type: ignore[misc]
    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: Any, text: str) -> Any:
    plain = _PLAIN.fullmatch(text) and not _NOT_TEXT.fullmatch(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def dump(document: object) -> str:
    """Return *document* (dicts, lists, texts, whole numbers, booleans) as block YAML, keys in their order."""
    made = yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=False
    )
    return str(made)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core: no yes/no, no sexagesimal numbers, no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in ("merge", "null")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def load(text: str, name: str) -> Any:
    """Return the document in *text*; ConfigError, with *name* and line, when it is none or unreasonably large or deep."""
    if len(text.encode()) > BYTES_MAX:
        raise ConfigError(f"{name}: larger than {BYTES_MAX >> 10} KB")
    try:
        _check(text, name)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error


def _check(text: str, name: str) -> None:
    depth = aliases = 0
    open_anchors: list[str | None] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            open_anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in open_anchors:
                raise ConfigError(f"{name}: *{event.anchor} holds itself")
        if depth > DEPTH_MAX or aliases > ALIASES_MAX:
            raise ConfigError(f"{name}: nested too deeply, or too many aliases")
