"""Packaging: every fact about the project stands in settings.ini; this file only reads it."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here/"settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
lines = lambda key: [l.strip() for l in s[key].splitlines() if l.strip()]

setup(name=s["lib_name"], version=s["version"], description=s["description"], author=s["author"], license=s["license"],
      keywords=s["keywords"], python_requires=">=" + s["min_python"],
      long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
      packages=find_packages(include=["hcd_nb*"]), install_requires=lines("requirements"),
      extras_require={k.removesuffix("_requirements").replace("_", "-"): lines(k) for k in s if k.endswith("_requirements")},
      entry_points={"console_scripts": lines("console_scripts")})
