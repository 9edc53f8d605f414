"""The parts of a release agree: versions, dates, links, and the index's description."""

import itertools
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import pytest
import setuptools
import yaml

import tpp_jax as tpp

ROOT = pathlib.Path(__file__).parents[1]
ADDRESS = "https://github.com/tpp-jax/tpp_jax"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def project():
    return tomllib.loads(read("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def description():
    """The text that the index shows, as setup.py passes it on."""
    passed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", passed.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    assert passed["long_description_content_type"] == "text/markdown"
    return passed["long_description"]


def test_the_newest_section_of_the_changelog_is_this_version():
    sections = re.findall(r"^## \[(.+)\] - (.+)$", read("CHANGELOG.md"), re.M)
    assert sections[0][0] == tpp.__version__
    for version, date in sections:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d|Unreleased", date), version
        assert f"\n[{version}]: {ADDRESS}/releases/tag/v{version}" in read(
            "CHANGELOG.md"
        )


def test_the_changelog_names_public_functions_that_exist():
    named = set(re.findall(r"`([a-z_]+)`", read("CHANGELOG.md")))
    parts = {"fit", "tpp-jax", "allow_pickle"}
    unknown = {n for n in named - parts if "_" in n and not hasattr(tpp, n)}
    assert unknown <= {"tpp_jax"}


def test_the_citation_has_the_fields_of_the_format_and_names_the_paper():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert str(cited["version"]) == tpp.__version__
    assert cited["license"] == project()["license"]
    assert cited["repository-code"] == project()["urls"]["Repository"] == ADDRESS
    assert cited["url"] == project()["urls"]["Documentation"]
    [paper] = cited["references"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2023
    assert [a["family-names"] for a in paper["authors"]] == ["Wang", "Fu"]
    assert all(a.keys() & {"name", "family-names"} for a in cited["authors"])


def test_links_of_the_description_are_absolute_and_name_files(description):
    links = re.findall(r"""\]\((\S+?)\)|src(?:set)?="(\S+?)\"""", description)
    places = [place for pair in links for place in pair if place]
    assert len(places) > 10
    for place in places:
        assert place.startswith(("https://", "#")), place
        if file := re.match(rf"{ADDRESS}/(raw|blob)/v(.+?)/(.+?)(#|$)", place):
            assert file[2] == tpp.__version__
            assert (ROOT / file[3]).exists(), place
            assert (file[1] == "raw") == (file[3].endswith((".png", ".svg")))
    assert description.count("\n") == read("README.md").count("\n")


def test_classifiers_name_the_versions_of_python_that_are_tested():
    said = project()["classifiers"]
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    tested = jobs["fast"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    versions = [c.removeprefix(prefix) for c in said if re.search(r"\d\.\d+$", c)]
    assert versions == tested
    assert project()["requires-python"] == f">={tested[0]}"
    assert said == sorted(said)


def test_a_version_is_published_only_from_a_tag_and_after_the_tests():
    workflow = yaml.safe_load(read(".github/workflows/publish.yml"))
    # YAML reads the word `on` as True.
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert jobs["publish"]["needs"] == ["test", "build"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"
    assert "workflow_call" in yaml.safe_load(read(".github/workflows/test.yml"))[True]
    # The token of trusted publishing is for one job only.
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert '.ci/check-tag "$GITHUB_REF_NAME"' in steps
    assert "make release-check" in steps


def check_tag(folder, tag):
    command = [sys.executable, folder / ".ci" / "check-tag", tag]
    done = subprocess.run(command, text=True, capture_output=True)
    return done.returncode, done.stderr


def test_a_tag_is_refused_until_all_files_name_its_version_and_date(tmp_path):
    for name in (".ci/check-tag", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tpp_jax").mkdir()
    (tmp_path / "tpp_jax" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    assert "is 9.8.7, tag has another" in check_tag(tmp_path, "v9.8.6")[1]
    assert "CITATION.cff has another" in check_tag(tmp_path, "v9.8.7")[1]
    cited = f"version: {tpp.__version__}"
    text = read("CITATION.cff").replace(cited, "version: 9.8.7")
    text = re.sub("^date-released.*\n", "", text, flags=re.M)
    (tmp_path / "CITATION.cff").write_text(text)
    assert "CHANGELOG.md has another" in check_tag(tmp_path, "v9.8.7")[1]
    (tmp_path / "CHANGELOG.md").write_text("## [9.8.7] - Unreleased\n")
    assert "write the date" in check_tag(tmp_path, "v9.8.7")[1]
    (tmp_path / "CHANGELOG.md").write_text("## [9.8.7] - 2030-01-02\n")
    assert "date-released: 2030-01-02" in check_tag(tmp_path, "v9.8.7")[1]
    (tmp_path / "CITATION.cff").write_text(f"{text}date-released: 2030-01-02\n")
    assert check_tag(tmp_path, "v9.8.7") == (0, "")


def test_what_the_security_page_names_exists():
    page = read("SECURITY.md")
    folder = ROOT / "tests"
    for name in re.findall(r"test_\w+\.py", page):
        assert any(folder.rglob(name)), name


@pytest.mark.parametrize("name", ["bug", "not_pruned"])
def test_templates_of_issues_have_what_the_site_requires(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in form["body"])


def test_every_url_of_the_project_has_one_address():
    files = itertools.chain(
        ROOT.glob("*.md"), ROOT.glob("docs/*.md"), ROOT.glob("*.cff")
    )
    for file in files:
        for url in re.findall(
            r"https://github\.com/[^/]*tpp[^/]*/\w+", file.read_text()
        ):
            assert url == ADDRESS, file
