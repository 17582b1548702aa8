"""Packaging. Must not replace a torch, mmcv, mmengine, mmdet or mmpose that is already installed.

So those, and opacus (which would pull a newer torch), are no install requirement:
mmpose_dp/compat.py checks them at import and says what to type. `make install` makes a complete,
pinned environment from requirements/.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict = {}
exec((ROOT / 'mmpose_dp/version.py').read_text(), VERSION)
README = ROOT / 'README.md'

setup(
    name='mmpose_dp',
    version=VERSION['__version__'],
    description="Differentially private training for MMPose's top-down models",
    long_description=README.read_text() if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmpose_dp', 'mmpose_dp.*']),
    # .mim/ has links to tools/, model-index.yml and configs/ ('mmpose_dp::dp/...'); the wheel has the files
    package_data={
        'mmpose_dp': [
            'py.typed',
            'privacy/__init__.pyi',
            'statement.schema.json',
            '.mim/model-index.yml',
            '.mim/configs/*/*.py',
            '.mim/configs/*/*.yml',
            '.mim/tools/*.py',
            '.mim/tools/*.sh',
            '.mim/tools/html/*',
        ]
    },
    exclude_package_data={'mmpose_dp': ['.mim/tools/plan_fit.py']},  # rewrites a page of docs/
    entry_points={'console_scripts': ['mmpose_dp = mmpose_dp.__main__:main']},
    install_requires=['dp-accounting>=0.4.4', 'opt-einsum>=3.3', 'numpy', 'scipy'],
    extras_require={'opacus': ['opacus>=1.5.0']},  # its torch requirement may replace yours
)
