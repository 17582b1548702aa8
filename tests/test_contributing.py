"""The recipes of CONTRIBUTING.md: each one's code and test, run as they stand there."""

import inspect
import re

import pytest
from mmpose.registry import MODELS, TRANSFORMS

from mmpose_dp.gradients import layer_rules
from mmpose_dp.privacy.accounting import ACCOUNTANTS
from tests.support.paths import REPO

RECIPES = dict(
    re.findall(r'^### (.+?) \(\d+ minutes\)\n(.*?)(?=^### |\Z)', (REPO / 'CONTRIBUTING.md').read_text(), re.M | re.S)
)


@pytest.fixture(autouse=True)
def unregistered():
    """Takes back what a recipe registers."""
    tables = [ACCOUNTANTS, layer_rules._RULES, *(registry._module_dict for registry in (MODELS, TRANSFORMS))]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before):
        table.clear()
        table.update(content)


@pytest.mark.parametrize('name', ['A head', 'A layer rule', 'A public view', 'An accountant'])
def test_a_recipe_works_as_written(name, request):
    code, test = re.findall(r'^```python\n(.*?)^```', RECIPES[name], re.M | re.S)
    names = {'__name__': 'recipe'}
    exec(code, names)
    exec(test, names)
    (own,) = (value for key, value in names.items() if key.startswith('test_'))
    own(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(own).parameters})


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_names_files_that_exist(name):
    for path in re.findall(r'\b(?:mmpose_dp|tests|tools)/[\w/]+(?:\.py)?', RECIPES[name]):
        assert 'your_view' in path or (REPO / path).exists(), path
