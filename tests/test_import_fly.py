"""fly.toml files of strangers become the nearest fleet, and everything else is told."""

from __future__ import annotations

import pytest
from exports_support import ROOT
from test_export_fly import KEYS, unknown

from slum.errors import ConfigError
from slum.exports.fly_import import companions, import_fly
from slum.exports.slumtoml import slum_toml
from slum.model import FlyOperator, Listen, Restart
from slum.validate import check_fleet

EXAMPLE = ROOT / "examples" / "import" / "fly.toml"


def test_the_example() -> None:
    import tomllib

    text = EXAMPLE.read_text()
    assert unknown(tomllib.loads(text), KEYS) == []
    assert companions("examples/import/fly.toml", text) == ("app/Dockerfile",)
    found = import_fly({"fly.toml": text, "app/Dockerfile": (EXAMPLE.parent / "app/Dockerfile").read_text()})
    assert check_fleet(found.fleet) == ()
    operator = FlyOperator(name="fly", org="personal", region="fra", cpus=2, memory_mb=1024, volume_gb=10)
    assert found.fleet.operators == (operator,)
    (tenement,) = found.fleet.tenements
    web, worker = tenement.services
    assert (web.name, web.listen, web.port, web.health) == ("web", Listen.PORT, 8080, "/healthz")
    assert (web.startup_timeout_s, web.stop_timeout_s, web.restart) == (10.0, 30.0, Restart.ON_FAILURE)
    assert web.pre_deploy == "python manage.py migrate"
    assert {v.name: v.value for v in web.env} == {"LOG_LEVEL": "info", "UPLOADS": "{data_dir}/uploads"}
    assert (worker.listen, worker.memory_limit_mb) == (Listen.NONE, 512)
    places = {loss.path for loss in found.losses}
    assert places >= {
        f"guestbook.{key}" for key in ("statics", "env.PORT", "http_service.concurrency", "mounts", "build")
    }
    assert slum_toml(found.fleet)


def test_an_app_without_processes_is_one_service_by_its_name() -> None:
    found = import_fly({"fly.toml": 'app = "My_App"\n[build]\nimage = "nginx:1"\n[http_service]\ninternal_port = 80\n'})
    ((service,),) = [tenement.services for tenement in found.fleet.tenements]
    assert (service.name, service.image, service.port) == ("my-app", "nginx:1", 80)
    assert check_fleet(found.fleet) == ()


def test_what_is_no_toml_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"fly\.toml:2"):
        import_fly({"fly.toml": "app = 'x'\nx = \n"})
