"""Package metadata of fairseq_evomoe."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "fairseq_evomoe/__init__.py").read_text()).group(1)

setup(
    name="fairseq-evomoe",
    version=VERSION,
    description="Mixture-of-Experts models for fairseq that grow from one expert to many while they train",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_evomoe", "fairseq_evomoe.*"]),
    package_data={"fairseq_evomoe": ["py.typed", "bin/*.py", "config/presets/*.yaml", "report/template/*"]},
    scripts=["fairseq_evomoe/bin/evomoe"],
    python_requires=">=3.9",
    install_requires=[
        "torch>=1.12,<2.14",
        # PyPI's fairseq cannot be imported on Python 3.11; ve-fairseq is a rebuild that can (see README)
        'fairseq==0.12.2; python_version < "3.11"',
        've-fairseq==0.12.3; python_version >= "3.11"',
        "hydra-core>=1.0.7,<1.4",
        "numpy",
        "PyYAML",
        "sacrebleu",
        "scipy",
        "sentencepiece",
    ],
    extras_require={
        "benchmark": ["fairscale", "matplotlib", "mixture-of-experts", "st-moe-pytorch", "transformers"],
        "examples": ["matplotlib", "tqdm"],
        "export": ["safetensors", "transformers"],
        "report": ["matplotlib>=3.7", "tqdm"],
        "test": (
            "coverage hypothesis ipykernel matplotlib mypy nbclient pytest pytest-xdist ruff safetensors "
            "tensorboardX tqdm"
        ).split(),
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
