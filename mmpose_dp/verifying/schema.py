"""Whether a value follows a JSON schema, without a library. Must read only what statement.schema.json uses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[1] / 'statement.schema.json'
_TYPES = {
    'object': dict,
    'array': list,
    'string': str,
    'number': (int, float),
    'integer': int,
    'boolean': bool,
    'null': type(None),
}


def schema_faults(value: Any, schema: dict[str, Any], where: str = '') -> Iterator[str]:
    """Where a value does not follow a JSON schema, of which type, const, required, properties and items are read."""
    kinds = schema.get('type', list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    number = isinstance(value, bool) and 'boolean' not in kinds
    if number or not isinstance(value, tuple(t for k in kinds for t in _as_tuple(_TYPES[k]))):
        yield f'{where or "it"} is not {" or ".join(kinds)}'
        return
    if 'const' in schema and value != schema['const']:
        yield f'{where} is not {schema["const"]!r}'
    if isinstance(value, dict):
        yield from (f'{where}{name} is missing' for name in schema.get('required', ()) if name not in value)
        for name, inner in schema.get('properties', {}).items():
            if name in value:
                yield from schema_faults(value[name], inner, f'{where}{name}.')
    if isinstance(value, list) and 'items' in schema:
        for one in value:
            yield from schema_faults(one, schema['items'], f'{where}items.')


def _as_tuple(kind: Any) -> tuple:
    return kind if isinstance(kind, tuple) else (kind,)
