"""fleetfile and validate together: what is refused, with file, line, key and what is wrong; one case each."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_support import HEAD, problems, write

from slum.errors import ConfigError
from slum.fleetfile import PROBLEMS_SHOWN, load

WEB = HEAD + '[tenement.here.service.web]\ncommand = "x"\n'
"""Lines 1 to 6; the case's lines follow from 7 on."""
AT = "tenement.here.service.web"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # unknown keys, with the nearest valid word
        ('operater = "x"', f"7: {AT}.operater: unknown key"),
        ("memory_limit = 1", f"7: {AT}.memory_limit: unknown key; did you mean `memory_limit_mb`?"),
        ('Command = "x"', f"7: {AT}.Command: unknown key; did you mean `command`?"),
        ("[tenement.here.servics.x]", "7: tenement.here.servics: unknown key; did you mean `service`?"),
        (
            "[tenement.here.settings]\nmax_restart = 1",
            "8: tenement.here.settings.max_restart: unknown key; did you mean `max_restarts`?",
        ),
        ("[fleet]\ndomian = 'x'", "8: fleet.domian: unknown key; did you mean `domain`?"),
        ("[operator.x]", "7: operator: unknown key; did you mean `operators`?"),
        (
            "[operators.x]\ntype = 'fly'\norg = 'o'\nregion = 'iad'\nregoin = 'x'",
            "11: operators.x.regoin: unknown key; did you mean `region`?",
        ),
        (
            "[operators.x]\ntype = 'ssh'\nhosts = [{ host = 'h', prt = 1 }]",
            "9: operators.x.hosts.0.prt: unknown key; known are host",
        ),
        # wrong types
        ("memory_limit_mb = true", f"7: {AT}.memory_limit_mb: true is not a whole number"),
        ("memory_limit_mb = 1.0", f"7: {AT}.memory_limit_mb: 1.0 is not a whole number"),
        ('memory_limit_mb = "64"', f'7: {AT}.memory_limit_mb: "64" is not a whole number'),
        ("drain_timeout = '5s'", f'7: {AT}.drain_timeout: "5s" is not a number'),
        ("drain_timeout = false", f"7: {AT}.drain_timeout: false is not a number"),
        ("health = 1", f'7: {AT}.health: 1 is not text; write "1"'),
        ("args = 'x'", f'7: {AT}.args: "x" is not a list of texts'),
        ("args = ['x',\n 1]", f"8: {AT}.args.1: 1 is not text"),
        ("env = { A = 1 }", f'7: {AT}.env.A: 1 is not text; write "1"'),
        ("env = ['A=1']", f"7: {AT}.env: a list is not a table of texts"),
        ("depends_on = 'web'", f'7: {AT}.depends_on: "web" is not a list of texts'),
        ("[tenement.here.instances]\nweb = 'a'", '8: tenement.here.instances.web: "a" is not a list of texts'),
        ("[tenement.here.service]\nx = 1", "8: tenement.here.service.x: 1 is not a table"),
        ("[tenement]\nx = 'y'", '8: tenement.x: "y" is not a table'),
        # closed sets
        ('isolation = "sandbax"', f'7: {AT}.isolation: "sandbax" is none of process, namespace, sandbox, wasm, vm'),
        ('listen = "http"', f'7: {AT}.listen: "http" is none of socket, fd, port, none'),
        ("restart = true", f"7: {AT}.restart: true is none of always, on-failure, never"),
        ('deploy = "rolling"', f'7: {AT}.deploy: "rolling" is none of overlap, replace'),
        ("[operators.x]\ntype = 'aws'", '8: operators.x.type: "aws" is none of local, ssh, fly, hetzner, join'),
        ("[operators.x]", "7: operators.x: needs `type`: one of local, ssh, fly, hetzner, join"),
        # numbers
        ("memory_limit_mb = -1", f"7: {AT}.memory_limit_mb: -1 is not between 1 and 4194304"),
        ("memory_limit_mb = 0", f"7: {AT}.memory_limit_mb: 0 is not between 1 and 4194304"),
        ("pids_limit = 99999999999999999999", f"7: {AT}.pids_limit: 99999999999999999999 is not between 1 and 4194304"),
        (f"cpu_shares = {'9' * 300}", f"7: {AT}.cpu_shares: a huge number is not between 1 and 10000"),
        ("cpu_shares = 10001", f"7: {AT}.cpu_shares: 10001 is not between 1 and 10000"),
        ("drain_timeout = nan", f"7: {AT}.drain_timeout: nan is not between 0 and 3600"),
        ("drain_timeout = -inf", f"7: {AT}.drain_timeout: -inf is not between 0 and 3600"),
        (f"stop_timeout = {'9' * 400}", f"7: {AT}.stop_timeout: inf is not between 0 and 3600"),
        ("startup_timeout = 0", f"7: {AT}.startup_timeout: 0.0 is not between 0.1 and 3600"),
        ("request_timeout = nan", f"7: {AT}.request_timeout: nan is not between 0.001 and 86400"),
        (
            "[tenement.here.settings]\nbackoff_base_ms = 40000",
            "8: tenement.here.settings.backoff_base_ms: 40000 is more than backoff_max_ms, 30000",
        ),
        (
            "[tenement.here.settings]\nhealth_check_interval = 0",
            "8: tenement.here.settings.health_check_interval: 0.0 is not between 0.1 and 3600",
        ),
        # names
        *(
            (
                f"[tenement.here.service.{quoted}]\ncommand = 'x'",
                f"7: tenement.here.service.{path}: {path if path[0] == chr(34) else chr(34) + path + chr(34)} is no name",
            )
            for quoted, path in (
                ('"../x"', '"../x"'),
                ("Web2", "Web2"),
                ('"é"', '"é"'),
                ('""', '""'),
                ("a" * 33, "a" * 33),
                ("-a", "-a"),
                ("a-", "a-"),
                ("a_b", "a_b"),
                ('"a b"', '"a b"'),
                (r'"a\u0000"', r'"a\u0000"'),
                (r'"a\n"', r'"a\n"'),
            )
        ),
        ("[tenement.here.instances]\nweb = ['../x']", '8: tenement.here.instances.web: "../x" is no id'),
        ("[tenement.here.instances]\nweb = ['']", '8: tenement.here.instances.web: "" is no id'),
        (f"[tenement.here.instances]\nweb = ['{'a' * 41}']", f'8: tenement.here.instances.web: "{"a" * 41}" is no id'),
        ("[tenement.'../x']\noperator = 'local'", '7: tenement."../x": "../x" is no name'),
        ("[operators.'X Y']\ntype = 'local'", '7: operators."X Y": "X Y" is no name'),
        ("[fleet]\nname = '/etc'", '8: fleet.name: "/etc" is no name'),
        ("[fleet]\ndomain = 'Example.com'", '8: fleet.domain: "Example.com" is no lower-case domain name'),
        ("[fleet]\ndomain = 'a..b'", '8: fleet.domain: "a..b" is no lower-case domain name'),
        # duplicates
        ("[tenement.here.instances]\nweb = ['a', 'a']", '8: tenement.here.instances.web: "a" is given twice'),
        (
            "[tenement.here.instances]\nweb = ['a', 'A']",
            '8: tenement.here.instances.web: "A" and "a" differ only by case',
        ),
        ("[tenement.here.service.Web]\ncommand = 'x'", '5: tenement.here.service: "Web" and "web" differ only by case'),
        ("[tenement.HERE]\noperator = 'local'", '3: tenement: "HERE" and "here" differ only by case'),
        ("[operators.LOCAL]\ntype = 'local'", '1: operators: "LOCAL" and "local" differ only by case'),
        (
            "[tenement.here.process.web]\ncommand = 'x'",
            "7: tenement.here.process.web: is declared under `service` too (line 5)",
        ),
        (
            "runtime = 'process'\nisolation = 'process'",
            f"7: {AT}.runtime: is an old word for `isolation`, which is there too",
        ),
        ("env = { A = '1' }\nsecrets = { A = 'env:A' }", f"8: {AT}.secrets.A: is in `env` too; keep one of them"),
        # references
        (
            "[tenement.b]\noperator = 'locl'",
            '8: tenement.b.operator: "locl" is no operator of this fleet; did you mean `local`?',
        ),
        ("depends_on = ['wbe']", f'7: {AT}.depends_on: "wbe" is no service of this tenement; did you mean `web`?'),
        (
            "[tenement.here.instances]\nwbe = ['a']",
            '8: tenement.here.instances.wbe: "wbe" is no service of this tenement; did you mean `web`?',
        ),
        ("depends_on = ['web']", f"7: {AT}.depends_on: a service cannot depend on itself"),
        (
            "depends_on = ['b']\n[tenement.here.service.b]\ncommand='x'\ndepends_on = ['c']\n"
            "[tenement.here.service.c]\ncommand='x'\ndepends_on = ['web']",
            "10: tenement.here.service.b.depends_on: is a cycle: b -> c -> web -> b",
        ),
        # machines
        ("[tenement.z]\noperator = 'local'", '8: tenement.z.operator: is on the machine of tenement "here"'),
        ("[tenement.b]\noperator = 'local'\ncount = 2", "9: tenement.b.count: 2 is more than the one machine"),
        ("[tenement.b]\noperator = 'local'\ncount = -1", "9: tenement.b.count: -1 is not between 1 and 1000"),
        (
            "[operators.s]\ntype = 'ssh'\nhosts = ['a']\n[tenement.b]\noperator = 's'\ncount = 2",
            '12: tenement.b.count: the tenements of "s" need 2 machines, it has 1 hosts',
        ),
        (
            "[operators.s]\ntype = 'ssh'\nhosts = ['a', 'b', 'c']\n[tenement.b]\noperator = 's'\ncount = 2\n[tenement.b-1]\noperator = 's'",
            '13: tenement.b-1: its machine "b-1" has the name of one of tenement "b"',
        ),
        (
            f"[operators.s]\ntype = 'ssh'\nhosts = ['a', 'b', 'c']\n[tenement.{'b' * 31}]\noperator = 's'\ncount = 2",
            f'10: tenement.{"b" * 31}: with count 2 its machine "{"b" * 31}-1" has a name over 32 characters',
        ),
        # ports
        ("listen = 'port'\nport = 8080", f"8: {AT}.port: 8080 is the router's port"),
        (
            "listen = 'port'\nport = 9000\n[tenement.here.service.b]\ncommand='x'\nlisten='port'\nport = 9000",
            f"8: {AT}.port: 9000 is the port of service b too",
        ),
        ("listen = 'port'\nport = 70000", f"8: {AT}.port: 70000 is not between 1 and 65535"),
        ("listen = 'port'", f'5: {AT}.port: listen = "port" needs it'),
        ("port = 9000", f'7: {AT}.port: needs listen = "port", but listen is "socket"'),
        (
            "listen = 'port'\nport = 9000\n[tenement.here.instances]\nweb = ['a', 'b']",
            f"8: {AT}.port: 2 instances cannot share one port",
        ),
        (
            "[tenement.here.routing]\nlisten = 'localhost:80'",
            '8: tenement.here.routing.listen: "localhost:80" is no address and port',
        ),
        (
            "[tenement.here.routing]\nlisten = '0.0.0.0:65536'",
            '8: tenement.here.routing.listen: "0.0.0.0:65536" is no address and port',
        ),
        (
            "[tenement.here.routing]\nlisten = '1.2.3.999:80'",
            '8: tenement.here.routing.listen: "1.2.3.999:80" is no address and port',
        ),
        (
            "[tenement.here.routing]\nlisten = ['0.0.0.0:80', '127.0.0.1:80']",
            '8: tenement.here.routing.listen: "127.0.0.1:80" clashes',
        ),
        (
            "[tenement.here.routing]\nlisten = []",
            "8: tenement.here.routing.listen: 0 addresses are not between 1 and 16",
        ),
        # paths
        (
            "[tenement.here.settings]\ndata_dir = '~/data'",
            '8: tenement.here.settings.data_dir: "~/data": `~` is not expanded',
        ),
        (
            "[tenement.here.settings]\ndata_dir = 'data'",
            '8: tenement.here.settings.data_dir: "data" is not an absolute path',
        ),
        (
            "[tenement.here.settings]\ndata_dir = '/srv/../etc'",
            '8: tenement.here.settings.data_dir: "/srv/../etc" leaves its folder',
        ),
        (
            "[tenement.here.settings]\ndata_dir = '/etc/.'",
            '8: tenement.here.settings.data_dir: "/etc/." belongs to the system',
        ),
        (
            "[tenement.here.settings]\ndata_dir = '//proc//x'",
            '8: tenement.here.settings.data_dir: "//proc//x" belongs to the system',
        ),
        ("workdir = '../x'", f'7: {AT}.workdir: "../x" leaves its folder by `..`'),
        ("source = './nothing'", f'7: {AT}.source: "./nothing": no such file or directory'),
        ("source = 'slum.toml'", f'7: {AT}.source: "slum.toml" is not a folder'),
        ("source = '~/x'", f"7: {AT}.source: `~` is not expanded"),
        (
            "socket = '/run/slum/p/api.sock'",
            f"""7: {AT}.socket: "/run/slum/p/api.sock" must lie in the instance's folder""",
        ),
        ("socket = '{data_dir}/../x'", f'7: {AT}.socket: "{{data_dir}}/../x" leaves its folder'),
        (f"socket = '{{data_dir}}/{'x' * 80}'", f"7: {AT}.socket: is longer than 80 bytes"),
        ("socket = '{data_dir}/a'\ndeploy = 'overlap'", f"7: {AT}.socket: two generations cannot bind one path"),
        ("[tenement.b]\noperator = 'local'\nconfig = 'none.toml'", "9: tenement.b.config: none.toml: no such file"),
        ("[tenement.b]\noperator = 'local'\nconfig = '.'", "9: tenement.b.config: "),
        ("[tenement.b]\noperator = 'local'\nconfig = '~/t.toml'", "9: tenement.b.config: `~` is not expanded"),
        (
            "[tenement.b]\noperator = 'local'\nconfig = 't.toml'\n[tenement.b.service.x]\ncommand='x'",
            "10: tenement.b.service: stands beside `config`",
        ),
        # commands
        ("command = ''", "not TOML: cannot overwrite a value: the same key twice"),
        ("[tenement.here.service.b]\ncommand = ''", "8: tenement.here.service.b.command: is empty"),
        ("[tenement.here.service.b]\ncommand = []", "8: tenement.here.service.b.command: is empty"),
        ("[tenement.here.service.b]\ncommand = ' '", "8: tenement.here.service.b.command: is empty"),
        ("[tenement.here.service.b]\ncommand = ['', 'x']", "8: tenement.here.service.b.command: is empty"),
        (
            '[tenement.here.service.b]\ncommand = "echo \'x"',
            '8: tenement.here.service.b.command: "echo \'x": no closing quotation',
        ),
        ("[tenement.here.service.b]\ncommand = ['a', \"\\u0000\"]", "8: tenement.here.service.b.command: holds a NUL"),
        ("[tenement.here.service.b]\nlisten = 'none'", "7: tenement.here.service.b: needs `command`"),
        ("build = 'make'", f"7: {AT}.build: needs a `source` to build"),
        ("pre_deploy = ' '", f"7: {AT}.pre_deploy: is empty"),
        # placeholders
        (
            "args = ['{ID}']",
            f'5: {AT}.command: "{{ID}}" is no placeholder; known are {{name}} {{id}}'.replace("5:", "6:"),
        ),
        ("env = { A = '{\"x\": 1}' }", f'7: {AT}.env.A: "{{\\"x\\": 1}}" is no placeholder'),
        ("env = { A = 'a } b' }", f'7: {AT}.env.A: "}}" is no placeholder'),
        ("env = { A = '{port}' }", f'7: {AT}.env.A: {{port}} has a value only with listen = "port"'),
        ("listen = 'none'\nenv = { A = '{socket}' }", f"8: {AT}.env.A: {{socket}} has a value only with listen"),
        # environment and secrets
        ("env = { SLUM_X = '1' }", f"7: {AT}.env.SLUM_X: is set by slum itself"),
        ("env = { SOCKET_PATH = '1' }", f"7: {AT}.env.SOCKET_PATH: is set by slum itself"),
        ("env = { 'A B' = '1' }", f'7: {AT}.env."A B": is no variable name'),
        ("env = { 'A=B' = '1' }", f'7: {AT}.env."A=B": is no variable name'),
        (f"env = {{ A = '{'x' * 66_000}' }}", f"7: {AT}.env: is larger than 65,536 bytes"),
        ("secrets = { A = 'hunter2' }", f'7: {AT}.secrets.A: is neither "file:/absolute/path" nor "env:NAME"'),
        ("secrets = { A = 'file:key' }", f'7: {AT}.secrets.A: is neither "file:/absolute/path" nor "env:NAME"'),
        ("secrets = { A = 'file:/../../etc/shadow' }", f'7: {AT}.secrets.A: "/../../etc/shadow" leaves its folder'),
        ("secrets = { A = 7 }", f'7: {AT}.secrets.A: is neither "file:/absolute/path" nor "env:NAME"'),
        # keys that do not go together
        ("kernel = '/k'", f'7: {AT}.kernel: needs isolation = "vm", but isolation is "namespace"'),
        ("vcpus = 2", f'7: {AT}.vcpus: needs isolation = "vm"'),
        ("image = 'x'", f'7: {AT}.image: needs isolation = "sandbox" or "vm"'),
        ("isolation = 'vm'\nimage = 'x'\nrootfs = '/x'", f"9: {AT}.rootfs: is given beside `image`"),
        ("idle_timeout = 60", f'7: {AT}.idle_timeout: needs listen = "fd", but listen is "socket"'),
        ("listen = 'none'\nhealth = '/x'", f'8: {AT}.health: needs a service that listens, but listen is "none"'),
        ("listen = 'none'\nrequest_timeout = 1", f"8: {AT}.request_timeout: needs a service that listens"),
        ("listen = 'none'\ndeploy = 'overlap'", f'8: {AT}.deploy: "overlap" needs listen = "socket" or "fd"'),
        ("listen = 'none'\nsocket = '{data_dir}/x'", f'8: {AT}.socket: needs listen = "socket" or "fd"'),
        ("health = 'healthz'", f'7: {AT}.health: "healthz" is no path'),
        ('health = "/a b"', f'7: {AT}.health: "/a b" is no path'),
        ("[tenement.here.instances]\nweb = []", "8: tenement.here.instances.web: has no ids"),
        # operators: what becomes an argument or a URL
        (
            "[operators.s]\ntype = 'ssh'\nhosts = ['-oProxyCommand=x']",
            '9: operators.s.hosts.0: "-oProxyCommand=x" is no host name',
        ),
        ("[operators.s]\ntype = 'ssh'\nhosts = ['-x@h']", '9: operators.s.hosts.0: "-x" is no user name'),
        (
            "[operators.s]\ntype = 'ssh'\nhosts = ['h:99999']",
            "9: operators.s.hosts.0.port: 99999 is not between 1 and 65535",
        ),
        ("[operators.s]\ntype = 'ssh'\nhosts = ['h:x']", '9: operators.s.hosts.0: "h:x" is not user@host:port'),
        ("[operators.s]\ntype = 'ssh'\nhosts = ['h', 'H']", '9: operators.s.hosts: "h" port 22 is given twice'),
        ("[operators.s]\ntype = 'ssh'\nhosts = []", "9: operators.s.hosts: 0 hosts are not between 1 and 1,000"),
        ("[operators.s]\ntype = 'ssh'\nhosts = [{ user = 'x' }]", "9: operators.s.hosts.0: has no `host`"),
        ("[operators.s]\ntype = 'ssh'", "7: operators.s: needs `hosts`"),
        (
            "[operators.s]\ntype = 'ssh'\nhosts = ['h']\nhost_key = 'pinned'",
            '9: operators.s.hosts.0: "h" has no fingerprint',
        ),
        ("[operators.s]\ntype = 'ssh'\nhosts = ['h']\njump = '-x'", '10: operators.s.jump: "-x" is not user@host:port'),
        (
            "[operators.f]\ntype = 'fly'\norg = '../x'\nregion = 'iad'",
            '9: operators.f.org: "../x" is no Fly organisation slug',
        ),
        (
            "[operators.f]\ntype = 'fly'\norg = 'x'\nregion = 'us-east'",
            '10: operators.f.region: "us-east" is no Fly region',
        ),
        ("[operators.f]\ntype = 'fly'\norg = 'x'", "7: operators.f: needs `region`"),
        (
            "[operators.h]\ntype = 'hetzner'\nlocation = 'f'\nserver_type = 'c/x'",
            '10: operators.h.server_type: "c/x" is no server type',
        ),
        (
            "[operators.h]\ntype = 'hetzner'\nlocation = 'f'\nserver_type = 'c'\ntoken_env = 'sk-secret'",
            "11: operators.h.token_env: is not the name",
        ),
        ("[tenement.b]\noperator = 'x'\nlabels = { 'a b' = 'c' }", '9: tenement.b.labels."a b": is no label'),
        ("[tenement.b]\noperator = 'x'\nlabels = { a = 'b c' }", '9: tenement.b.labels.a: "b c" is no label value'),
    ],
)
def test_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, WEB + text + "\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    found = [line.replace(f"{tmp_path}/", "") for line in (*caught.value.problems, caught.value.message)]
    start = f"slum.toml:{expected}" if expected[0].isdigit() else "slum.toml:7: " + expected
    assert any(line.startswith(start) for line in found), "\n".join([start, *found])


def test_all_problems_of_all_files_at_once(tmp_path: Path) -> None:
    """The example of the command line reference."""
    write(tmp_path, '\n\n\n\n\n\n\n[service.api]\nisolation = "sandbax"\ncommand = "x"\n', "tenement-api.toml")
    text = """\
[operators.local]
type = "local"
[operators.eu]
type = "hetzner"
location = "fsn1"
server_type = "cx23"

[tenement.other]
operator = "eu"
config = "tenement-api.toml"


[tenement.api-prod]
operater = "local"
config = "tenement-api.toml"


[tenement.workers]
operator = "eu"


count = -1
"""
    assert problems(tmp_path, text) == (
        "slum.toml:14: tenement.api-prod.operater: unknown key; did you mean `operator`?",
        "slum.toml:22: tenement.workers.count: -1 is not between 1 and 1000",
        'tenement-api.toml:9: service.api.isolation: "sandbax" is none of process, namespace, sandbox, wasm, vm',
    )


def test_a_value_that_cannot_be_read_is_not_judged_too(tmp_path: Path) -> None:
    text = WEB + 'listen = "prot"\nport = "80"\n[tenement.b]\noperator = 7\n'
    assert problems(tmp_path, text) == (
        f'slum.toml:7: {AT}.listen: "prot" is none of socket, fd, port, none',
        f'slum.toml:8: {AT}.port: "80" is not a whole number',
        'slum.toml:10: tenement.b.operator: 7 is not text; write "7"',
    )


def test_what_could_not_be_read_makes_no_second_problem(tmp_path: Path) -> None:
    text = WEB + 'listen = "prt"\nport = 8080\nidle_timeout = 300\nargs = ["{port}"]\n'
    assert problems(tmp_path, text) == (f'slum.toml:7: {AT}.listen: "prt" is none of socket, fd, port, none',)


def test_a_broken_config_file_is_named_with_its_own_line(tmp_path: Path) -> None:
    write(tmp_path, "a = 1\nb =\n", "t.toml")
    (line,) = problems(tmp_path, HEAD + 'config = "t.toml"\n')
    assert line == "slum.toml:5: tenement.here.config: t.toml:2: not TOML: invalid value (column 4)"


def test_thousands_of_problems_are_counted_and_cut(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"a{n} = 1\n" for n in range(1000)))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.message == "1000 problems"
    assert len(caught.value.problems) == PROBLEMS_SHOWN + 1
    assert caught.value.problems[-1] == "... and 800 more"


def test_secrets_never_stand_in_a_message(tmp_path: Path) -> None:
    text = WEB + "secrets = { A = 'hunter2', B = 'env:hunter2 x', C = ['hunter2'], D = 'hunter2:/x' }\n"
    assert "hunter2" not in "\n".join(problems(tmp_path, text))
