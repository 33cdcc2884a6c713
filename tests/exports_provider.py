"""A Terraform provider that knows schemas only: `terraform validate` and `plan` judge our files against them, offline.

Run by Terraform as `terraform-provider-NAME SCHEMA.json`, through a wrapper that exports_support writes. It never talks to
anything and refuses to create.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tf import runner, schema, types
from tf.blocks import SetNestedBlock
from tf.iface import Resource

TYPES = {
    "string": types.String(),
    "number": types.Number(),
    "bool": types.Bool(),
    "strings": types.List(types.String()),
    "numbers": types.Set(types.Number()),
    "map": types.Map(types.String()),
}


def attributes(table: dict[str, Any]) -> list[schema.Attribute]:
    """*table*: name -> [type, "required" | "optional" | "computed"]."""
    made = []
    for name, (kind, need) in sorted(table.items()):
        made.append(
            schema.Attribute(
                name,
                TYPES[kind],
                required=need == "required",
                optional=need == "optional",
                computed=need == "computed",
            )
        )
    return made


def blocks(table: dict[str, Any]) -> list[schema.NestedBlock]:
    return [
        SetNestedBlock(name, schema.Block(attributes(inner["attributes"]), blocks(inner.get("blocks", {}))))
        for name, inner in sorted(table.items())
    ]


def resource(prefix: str, name: str, table: dict[str, Any]) -> type[Resource]:
    class Made(Resource):  # type: ignore[misc]
        def __init__(self, provider: object) -> None: ...

        @classmethod
        def get_name(cls) -> str:
            return name.removeprefix(prefix)

        @classmethod
        def get_schema(cls) -> schema.Schema:
            return schema.Schema(attributes(table["attributes"]), block_types=blocks(table.get("blocks", {})))

        def create(self, ctx: Any, planned: Any) -> None:
            raise NotImplementedError

        def read(self, ctx: Any, current: dict[str, Any]) -> dict[str, Any]:
            return current

        def update(self, ctx: Any, current: Any, planned: Any) -> None:
            raise NotImplementedError

        def delete(self, ctx: Any, current: Any) -> None:
            raise NotImplementedError

        def import_(self, ctx: Any, id: str) -> dict[str, Any]:
            known = dict.fromkeys(table["attributes"])
            return {**known, **{key: [] for key in table.get("blocks", {})}, "id": id}

    return Made


class Provider:
    def __init__(self, name: str, table: dict[str, Any]) -> None:
        self.name, self.table = name, table

    def get_model_prefix(self) -> str:
        return f"{self.name}_"

    def get_provider_schema(self, diags: object) -> schema.Schema:
        return schema.Schema(attributes(self.table["provider"]))

    def full_name(self) -> str:
        return str(self.table["source"])

    def validate_config(self, diags: object, config: object) -> None: ...

    def configure_provider(self, diags: object, config: object) -> None: ...

    def get_data_sources(self) -> list[Any]:
        return []

    def get_functions(self) -> list[Any]:
        return []

    def get_resources(self) -> list[type[Resource]]:
        prefix = self.get_model_prefix()
        return [resource(prefix, name, table) for name, table in sorted(self.table["resources"].items())]

    def new_resource(self, kind: Any) -> Any:
        return kind(self)


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_text())
    runner.run_provider(Provider(document["name"], document), [sys.argv[0], *sys.argv[2:]])
