"""The tools of an installed package: ``mmpose_dp train CONFIG`` or ``python -m mmpose_dp train CONFIG`` runs tools/train.py.

For who has no clone; in a clone, .mim/ has a link to tools/. Must not hold anything of a tool.
"""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / '.mim/tools'


def tools() -> dict[str, str]:
    """The first sentence of each tool's docstring, by its name."""
    found = {'verify': 'Check a privacy statement against what it belongs to'}
    for path in sorted(TOOLS.glob('*.py')):
        text = path.read_text()
        if "\nif __name__ == '__main__':" in text:
            found[path.stem] = text.removeprefix('"""').partition('\n')[0].removesuffix('"""')
    return found


def main() -> None:
    """Runs the tool that is named first, with the other arguments. Exits with 2 if there is none of that name."""
    known, (name, *arguments) = tools(), sys.argv[1:] or ['--help']
    if name in known:
        sys.argv = [name, *arguments]
        if name == 'verify':
            runpy.run_module('mmpose_dp.verify', run_name='__main__')
        else:
            sys.path.insert(0, str(TOOLS))  # as for a script: the tools share modules
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        return
    lines = [f'  {tool:<20} {what}' for tool, what in known.items()]
    print('usage: mmpose_dp TOOL ...    (mmpose_dp TOOL -h: its arguments)', *lines, sep='\n')
    if name not in ('-h', '--help'):
        print(f'mmpose_dp: there is no tool {name!r}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
