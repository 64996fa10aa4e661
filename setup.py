"""Package metadata of fairseq_evomoe."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "fairseq_evomoe/__init__.py").read_text()).group(1)
# where the code is on the web; .github/workflows/release.yml says so
URL = os.environ.get("EVOMOE_URL", "").rstrip("/")


def long_description() -> str:
    """README.md, with links that lead somewhere from other sites, too, if ``URL`` is known."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not URL:
        return text
    own = r"\]\((?!https?:|mailto:|#)([^)]+)\)"  # ](a path of the repository)
    text = re.sub(r"(!\[[^\]]*)" + own, rf"\1]({URL}/raw/v{VERSION}/\2)", text)
    return re.sub(own, rf"]({URL}/blob/v{VERSION}/\1)", text)


setup(
    name="fairseq-evomoe",
    version=VERSION,
    description="Mixture-of-Experts models for fairseq that grow from one expert to many while they train",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=URL or None,
    project_urls={"Changelog": f"{URL}/blob/v{VERSION}/CHANGELOG.md"} if URL else {},
    license="MIT",
    packages=find_packages(include=["fairseq_evomoe", "fairseq_evomoe.*"]),
    package_data={"fairseq_evomoe": ["py.typed", "bin/*.py", "config/presets/*.yaml", "report/template/*"]},
    scripts=["fairseq_evomoe/bin/evomoe"],
    python_requires=">=3.9",
    install_requires=[
        # the oldest that is tried (tests/versions.sh); no upper bound: no newer one is known to fail
        "torch>=1.12",
        # compat.py mends these two line by line; for another fairseq pip install --no-deps.
        # PyPI's fairseq cannot be imported on Python 3.11; ve-fairseq is a rebuild that can
        # (examples/troubleshooting.md)
        'fairseq==0.12.2; python_version < "3.11"',
        've-fairseq==0.12.3; python_version >= "3.11"',
        # the oldest that fairseq 0.12.2 can be imported with; it sets the upper bound itself
        "hydra-core>=1.0.7",
        "numpy",
        "PyYAML",
        "sacrebleu",
        "scipy",
        "sentencepiece",
    ],
    extras_require={
        # peers that layers are timed beside (examples/benchmark)
        "benchmark": ["fairscale", "matplotlib", "mixture-of-experts", "st-moe-pytorch", "transformers"],
        # pictures and progress of examples/
        "examples": ["matplotlib", "tqdm"],
        # evomoe export and import
        "export": ["safetensors", "transformers"],
        # evomoe report; matplotlib 3.7 is the oldest that it was tried with
        "report": ["matplotlib>=3.7", "tqdm"],
        "test": (
            "coverage hypothesis ipykernel matplotlib mypy nbclient pytest pytest-xdist ruff safetensors "
            "tensorboardX tqdm"
        ).split(),
    },
    keywords="mixture-of-experts moe fairseq transformer pytorch machine-translation language-model",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        # those that were tried
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
)
