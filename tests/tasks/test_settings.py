"""Arguments win over variables, which win over the working directory."""

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.metrics_record import connect
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.settings import resolve_settings, serving_key


def test_settings_write_nothing(tmp_path):
    for tracking in (None, f"sqlite:///{tmp_path}/a/b/mlflow.db"):
        resolve_settings(tracking=tracking, environment={"RADLADS_HOME": str(tmp_path / "home")})
    assert list(tmp_path.iterdir()) == []
    connect(f"sqlite:///{tmp_path}/a/b/mlflow.db").search_experiments()
    assert (tmp_path / "a/b/mlflow.db").is_file()


def test_defaults_lie_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve_settings(environment={})
    assert found.store.uri == f"{tmp_path}/.radlads/store"
    assert found.tracking == f"sqlite:///{tmp_path}/.radlads/mlflow.db"
    assert found.work == tmp_path / ".radlads" / "work"
    assert found.grace_seconds == 60


def test_variables_and_arguments(tmp_path):
    env = {
        "RADLADS_HOME": f"{tmp_path}/h", "RADLADS_STORE": "s3://bucket/p/", "RADLADS_S3_ENDPOINT": "http://s3:9000",
        "RADLADS_TRACKING": "http://mlflow", "RADLADS_GRACE_SECONDS": "5", "RADLADS_RETRIES": "0",
    }  # fmt: skip
    found = resolve_settings(environment=env)
    assert found.store.model_dump() == {"uri": "s3://bucket/p", "endpoint_url": "http://s3:9000", "region": None}
    assert (found.tracking, found.grace_seconds, found.retries) == ("http://mlflow", 5, 0)
    found = resolve_settings(store=f"{tmp_path}/s", tracking="none", work=f"{tmp_path}/w", environment=env)
    assert (found.store.uri, found.tracking, found.work) == (f"{tmp_path}/s", "", tmp_path / "w")
    assert found.store.endpoint_url is None


@pytest.mark.parametrize("tracking", ["mlruns", "file:///x"])
def test_no_folder_of_runs(tracking):
    with pytest.raises(UserError, match="not an MLflow server"):
        resolve_settings(tracking=tracking, environment={})


@pytest.mark.parametrize("text", ["many", "-1"])
def test_numbers(text):
    with pytest.raises(UserError, match="RADLADS_RETRIES"):
        resolve_settings(environment={"RADLADS_RETRIES": text})


def test_the_key_of_a_server_is_of_a_variable_and_is_never_told() -> None:
    key = "sk-0123456789"
    assert serving_key(None, {}) is None
    assert serving_key(None, {"RADLADS_API_KEY": key}) == key
    assert serving_key("MINE", {"MINE": key, "RADLADS_API_KEY": "another-one"}) == key
    assert hide(f"Bearer {key}") == "Bearer ***"
    for name, env in (
        (key, {}),
        ("MINE", {"MINE": "short"}),
        ("MINE", {"MINE": "with a space"}),
        ("MINE", {"MINE": ""}),
    ):
        with pytest.raises(UserError) as refused:
            serving_key(name, env)
        assert not {key, *env.values()} & set(str(refused.value).split())
