"""Hetzner Cloud as the operator meets it: servers, actions, firewalls, SSH keys and the catalogue, with their rules.

Names are unique, servers are locked while an action works on them, actions take their time, lists come in pages of at
most 50, and a project has 3,600 calls an hour that come back one a second. Shapes are those of the official description.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fakes.cloud import Answer, Call, Cloud, Liar, Refused, Seen

from slum.operators.account import Clock

LOCATIONS = (
    ("fsn1", "DE", "Falkenstein"),
    ("nbg1", "DE", "Nuremberg"),
    ("hel1", "FI", "Helsinki"),
    ("ash", "US", "Ashburn"),
)
TYPES = (
    ("cx23", 2, 4, "x86", ("fsn1", "nbg1", "hel1")),
    ("cx33", 4, 8, "x86", ("fsn1", "nbg1", "hel1")),
    ("cpx22", 2, 4, "x86", ("fsn1", "nbg1", "hel1", "ash")),
    ("cax11", 2, 4, "arm", ("fsn1", "hel1")),
)
IMAGES = (
    ("debian-12", "debian", "x86"),
    ("debian-12", "debian", "arm"),
    ("debian-13", "debian", "x86"),
    ("ubuntu-24.04", "ubuntu", "x86"),
)
LABEL_KEY = re.compile(r"(?:[a-z0-9A-Z.-]{1,253}/)?[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?")
LABEL_VALUE = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?)?")
HOST = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?")


@dataclass
class Thing:
    """A server or firewall as it is answered, and when it came and went."""

    body: dict[str, Any]
    seen: Seen
    ready: float = 0.0


class FakeHetzner(Cloud):
    provider = "hetzner"

    def __init__(
        self, token: str = "T" * 64, liar: Liar | None = None, clock: Clock | None = None, *, limit: int = 3600
    ) -> None:
        super().__init__(token, liar, clock)
        self.servers: dict[int, Thing] = {}
        self.firewalls: dict[int, Thing] = {}
        self.ssh_keys: list[dict[str, Any]] = []
        self.actions: dict[int, tuple[dict[str, Any], float]] = {}
        self._last = 1000
        self._limit = limit
        self._left, self._counted = float(limit), 0.0

    # --- for tests ----------------------------------------------------------------------------------------------------

    def alive(self) -> dict[str, dict[str, Any]]:
        """Return the servers that exist, by name."""
        return {t.body["name"]: t.body for t in self.servers.values() if t.seen.died is None}

    def leftovers(self) -> list[str]:
        """Return whatever costs or confuses without belonging to a server."""
        used = {
            f["id"] for t in self.servers.values() if t.seen.died is None for f in t.body["public_net"]["firewalls"]
        }
        return [
            f"firewall {t.body['name']}"
            for number, t in self.firewalls.items()
            if t.seen.died is None and number not in used
        ]

    def add_server(self, name: str, labels: dict[str, str]) -> int:
        """Put a server there, as somebody else would have."""
        return self._new_server(name, TYPES[0], "fsn1", IMAGES[0], labels, [], self.at()).body["id"]

    def remove_server(self, name: str) -> None:
        """Delete one by hand."""
        self._end(next(t for t in self.servers.values() if t.body["name"] == name and t.seen.died is None))

    # --- the service --------------------------------------------------------------------------------------------------

    def error(self, status: int, code: str, message: str) -> Answer:
        body = {"error": {"code": code, "message": message, "details": None}}
        return Answer(status, body, {"X-Correlation-Id": f"c{len(self.calls):x}"})

    def limits(self, at: float) -> dict[str, str]:
        self._left = min(self._limit, self._left + (at - self._counted) * self._limit / 3600)
        self._counted = at
        full = int(1_800_000_000 + at + (self._limit - self._left) * 3600 / self._limit)
        headers = {"RateLimit-Limit": str(self._limit), "RateLimit-Reset": str(full)}
        if self._left < 1:
            answer = self.error(429, "rate_limit_exceeded", f"limit of {self._limit} requests per hour reached")
            answer.headers |= headers | {"RateLimit-Remaining": "0", "Retry-After": "5"}
            raise Refused(answer)
        self._left -= 1
        self._headers = headers | {"RateLimit-Remaining": str(int(self._left))}
        return self._headers

    def handle(self, call: Call) -> Answer:
        match call.method, call.path.removeprefix("/v1").strip("/").split("/"):
            case "GET", ["servers"]:
                return self._page(call, "servers", self._listed(self.servers, call))
            case "POST", ["servers"]:
                return self._create_server(call.body)
            case "GET", ["servers", number]:
                return self._ok(200, {"server": self._now(self._server(number))})
            case "PUT", ["servers", number]:
                return self._update(self._server(number), call.body)
            case "DELETE", ["servers", number]:
                return self._delete_server(self._server(number))
            case "POST", ["servers", number, "actions", "poweron"]:
                server = self._unlocked(self._server(number))
                server.body["status"] = "running"
                return self._ok(201, {"action": self._act("start_server", server, 2.0)})
            case "GET", ["actions", number]:
                return self._ok(200, {"action": self._action(int(number))})
            case "GET", ["firewalls"]:
                return self._page(call, "firewalls", self._listed(self.firewalls, call))
            case "POST", ["firewalls"]:
                return self._create_firewall(call.body)
            case "DELETE", ["firewalls", number]:
                return self._delete_firewall(int(number))
            case "GET", ["server_types"]:
                return self._page(call, "server_types", [_type(n, *one) for n, one in enumerate(TYPES)])
            case "GET", ["locations"]:
                return self._page(call, "locations", [_location(n, *one) for n, one in enumerate(LOCATIONS)])
            case "GET", ["images"]:
                return self._page(call, "images", [_image(n, *one) for n, one in enumerate(IMAGES)])
            case "GET", ["ssh_keys"]:
                return self._page(call, "ssh_keys", self.ssh_keys)
        raise Refused(self.error(404, "not_found", "no such path"))

    def _ok(self, status: int, body: Any = None) -> Answer:
        return Answer(status, body, dict(getattr(self, "_headers", {})))

    def _page(self, call: Call, what: str, items: list[dict[str, Any]]) -> Answer:
        page, size = int(call.query.get("page", 1)), min(int(call.query.get("per_page", 25)), 50)
        last = max(1, -(-len(items) // size))
        pagination = {
            "page": page,
            "per_page": size,
            "previous_page": page - 1 if page > 1 else None,
            "next_page": page + 1 if page < last else None,
            "last_page": last,
            "total_entries": len(items),
        }
        return self._ok(200, {what: items[(page - 1) * size : page * size], "meta": {"pagination": pagination}})

    def _listed(self, things: dict[int, Thing], call: Call) -> list[dict[str, Any]]:
        found = []
        for number, thing in things.items():
            body = thing.body
            if not thing.seen.is_listed(self.at()):
                continue
            if "name" in call.query and body["name"] != call.query["name"]:
                continue
            selector = call.query.get("label_selector")
            if selector is not None and selector not in {f"{key}={value}" for key, value in body["labels"].items()}:
                continue
            found.append(self._now(thing))
            if self.liar.says(self.liar.twice, "listed twice", number, len(self.calls)):
                found.append(self._now(thing))
        return found

    def _new_id(self) -> int:
        self._last += 1
        return self._last

    # --- servers ------------------------------------------------------------------------------------------------------

    def _create_server(self, body: dict[str, Any]) -> Answer:
        at, name = self.at(), body["name"]
        if not HOST.fullmatch(name):
            raise Refused(self.error(422, "invalid_input", "invalid input in field 'name'"))
        kind = next((one for one in TYPES if one[0] == body["server_type"]), None)
        if kind is None:
            raise Refused(self.error(422, "invalid_input", "invalid input in field 'server_type'"))
        if body.get("location") not in {one[0] for one in LOCATIONS}:
            raise Refused(self.error(422, "invalid_input", "invalid input in field 'location'"))
        if body["location"] not in kind[4]:
            raise Refused(self.error(422, "invalid_server_type", "unsupported location for server type"))
        image = next((one for one in IMAGES if one[0] == body["image"] and one[2] == kind[3]), None)
        if image is None:
            raise Refused(self.error(422, "invalid_input", "image not found"))
        if len(body.get("user_data", "").encode()) > 32 << 10:
            raise Refused(self.error(422, "invalid_input", "invalid input in field 'user_data'"))
        self._check_labels(body.get("labels", {}))
        known = {key["name"] for key in self.ssh_keys}
        if any(key not in known for key in body.get("ssh_keys", ())):
            raise Refused(self.error(422, "invalid_input", "ssh key not found"))
        firewalls = [one["firewall"] for one in body.get("firewalls", ())]
        if any(number not in self.firewalls or self.firewalls[number].seen.died is not None for number in firewalls):
            raise Refused(self.error(422, "invalid_input", "firewall not found"))
        if any(t.body["name"] == name and t.seen.is_there(at) for t in self.servers.values()):
            raise Refused(self.error(409, "uniqueness_error", "server name is already used"))
        if self.liar.says(self.liar.short_of, "room", name, len(self.calls)):
            raise Refused(self.error(412, "resource_unavailable", "error during placement"))
        labels = dict(body.get("labels", {}))
        if self.liar.says(self.liar.forget_labels, "labels", name, len(self.servers)):
            labels = {}
        server = self._new_server(name, kind, body["location"], image, labels, firewalls, at)
        self.on_boot(name, body.get("user_data", ""))
        takes = self._takes(3.0, name)
        action, following = self._act("create_server", server, takes), self._act("start_server", server, takes + 2.0)
        made = {"server": self._now(server), "action": action, "next_actions": [following]}
        return self._ok(201, {**made, "root_password": None if body.get("ssh_keys") else "YItygq1v3GYjjMomLaKc"})

    def _new_server(
        self, name: str, kind: Any, location: str, image: Any, labels: Any, firewalls: Any, at: float
    ) -> Thing:
        number = self._new_id()
        place = _location(0, *next(one for one in LOCATIONS if one[0] == location))
        address = {"ip": f"192.0.2.{number % 250}", "blocked": False, "dns_ptr": "static.example.com", "id": number}
        body = {
            "id": number,
            "name": name,
            "status": "running",
            "created": _when(at),
            "public_net": {
                "ipv4": address,
                "ipv6": {**address, "ip": "2001:db8::/64", "dns_ptr": []},
                "floating_ips": [],
                "firewalls": [{"id": firewall, "status": "applied"} for firewall in firewalls],
            },
            "private_net": [],
            "server_type": _type(0, *kind),
            "location": place,
            "datacenter": {
                "id": 1,
                "name": f"{location}-dc1",
                "description": location,
                "location": place,
                "server_types": {"supported": [], "available": [], "available_for_migration": []},
            },
            "image": _image(0, *image),
            "iso": None,
            "rescue_enabled": False,
            "locked": False,
            "backup_window": None,
            "outgoing_traffic": None,
            "ingoing_traffic": None,
            "included_traffic": 0,
            "protection": {"delete": False, "rebuild": False},
            "labels": labels,
            "volumes": [],
            "load_balancers": [],
            "primary_disk_size": 40,
            "placement_group": None,
        }
        self.servers[number] = Thing(body, Seen(at, self.liar.lag("server", name, number)))
        return self.servers[number]

    def _server(self, number: str) -> Thing:
        server = self.servers.get(int(number))
        if server is None or not server.seen.is_there(self.at()):
            raise Refused(self.error(404, "not_found", f"server with ID '{number}' not found"))
        return server

    def _unlocked(self, server: Thing) -> Thing:
        if server.seen.died is None and server.ready > self.at():
            raise Refused(self.error(423, "locked", "cannot perform operation because server is locked"))
        return server

    def _now(self, thing: Thing) -> dict[str, Any]:
        """Return a server or firewall as it is at this moment."""
        body = dict(thing.body)
        if "status" in body:
            is_busy = thing.ready > self.at()
            status = "deleting" if thing.seen.died is not None else "initializing" if is_busy else body["status"]
            return {**body, "locked": is_busy, "status": status}
        used = [t for t in self.servers.values() if t.seen.is_listed(self.at()) or t.seen.died is None]
        applied = [t.body["id"] for t in used if any(f["id"] == body["id"] for f in t.body["public_net"]["firewalls"])]
        return {**body, "applied_to": [{"type": "server", "server": {"id": number}} for number in applied]}

    def _update(self, server: Thing, body: dict[str, Any]) -> Answer:
        self._check_labels(body.get("labels", {}))
        server.body["labels"] = body.get("labels", server.body["labels"])
        return self._ok(200, {"server": self._now(server)})

    def _delete_server(self, server: Thing) -> Answer:
        self._unlocked(server)
        if server.body["protection"]["delete"]:
            raise Refused(self.error(423, "protected", "server deletion is protected"))
        self._end(server)
        return self._ok(200, {"action": self._act("delete_server", server, 2.0)})

    def _end(self, server: Thing) -> None:
        if server.seen.died is None:
            self.on_end(str(server.body["name"]))
            server.seen.died = self.at() + self._takes(1.0, "delete", server.body["name"])

    def _check_labels(self, labels: dict[str, str]) -> None:
        for key, value in labels.items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value) or key.startswith("hetzner.cloud/"):
                raise Refused(self.error(422, "invalid_input", "invalid input in field 'labels'"))

    # --- actions ------------------------------------------------------------------------------------------------------

    def _takes(self, seconds: float, *about: object) -> float:
        slow = self.liar.says(self.liar.slow, "slow", *about)
        return seconds * (self.liar.random("how slow", *about).uniform(4, 15) if slow else 1.0)

    def _act(self, command: str, server: Thing, takes: float) -> dict[str, Any]:
        number, at = self._new_id(), self.at()
        done = at + takes
        server.ready = max(server.ready, done)
        body = {
            "id": number,
            "command": command,
            "status": "running",
            "progress": 0,
            "started": _when(at),
            "finished": None,
            "resources": [{"id": server.body["id"], "type": "server"}],
            "error": None,
        }
        self.actions[number] = (body, done)
        return self._action(number)

    def _action(self, number: int) -> dict[str, Any]:
        if number not in self.actions:
            raise Refused(self.error(404, "not_found", "action not found"))
        body, done = self.actions[number]
        return (
            {**body, "status": "success", "progress": 100, "finished": _when(done)} if self.at() >= done else dict(body)
        )

    # --- firewalls ----------------------------------------------------------------------------------------------------

    def _create_firewall(self, body: dict[str, Any]) -> Answer:
        at = self.at()
        if any(t.body["name"] == body["name"] and t.seen.is_there(at) for t in self.firewalls.values()):
            raise Refused(self.error(409, "uniqueness_error", "firewall name is already used"))
        self._check_labels(body.get("labels", {}))
        rules = [{"description": None, "destination_ips": [], "port": None, **rule} for rule in body.get("rules", ())]
        number = self._new_id()
        made = {
            "id": number,
            "name": body["name"],
            "labels": body.get("labels", {}),
            "created": _when(at),
            "rules": rules,
        }
        self.firewalls[number] = Thing(made, Seen(at, self.liar.lag("firewall", number)))
        return self._ok(201, {"firewall": self._now(self.firewalls[number]), "actions": []})

    def _delete_firewall(self, number: int) -> Answer:
        firewall = self.firewalls.get(number)
        if firewall is None or firewall.seen.died is not None:
            raise Refused(self.error(404, "not_found", "firewall not found"))
        at = self.at()
        users = [t for t in self.servers.values() if t.seen.is_there(at)]
        if any(f["id"] == number for t in users for f in t.body["public_net"]["firewalls"]):
            raise Refused(self.error(422, "resource_in_use", "firewall is still in use"))
        firewall.seen.died = at
        return self._ok(204)


def _when(at: float) -> str:
    return datetime.fromtimestamp(1_800_000_000 + at % 1_000_000_000, UTC).isoformat(timespec="seconds")


def _location(number: int, name: str, country: str, city: str) -> dict[str, Any]:
    return {
        "id": number + 1,
        "name": name,
        "description": city,
        "country": country,
        "city": city,
        "latitude": 50.1,
        "longitude": 12.3,
        "network_zone": "eu-central" if country != "US" else "us-east",
    }


def _type(
    number: int, name: str, cores: int, memory: int, architecture: str, places: tuple[str, ...]
) -> dict[str, Any]:
    price = {"net": "0.0100", "gross": "0.0119"}
    prices = {"price_hourly": price, "price_monthly": price, "included_traffic": 1, "price_per_tb_traffic": price}
    where = {"deprecation": None, "recommended": True, "available": True}
    return {
        "id": number + 1,
        "name": name,
        "description": name.upper(),
        "cores": cores,
        "memory": memory,
        "disk": 40,
        "deprecated": False,
        "prices": [{"location": place, **prices} for place in places],
        "storage_type": "local",
        "cpu_type": "shared",
        "category": "Shared vCPU",
        "architecture": architecture,
        "locations": [{"id": n + 1, "name": place, **where} for n, place in enumerate(places)],
    }


def _image(number: int, name: str, flavor: str, architecture: str) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "system",
        "status": "available",
        "name": name,
        "description": name,
        "image_size": None,
        "disk_size": 10,
        "created": "2025-01-01T00:00:00+00:00",
        "created_from": None,
        "bound_to": None,
        "os_flavor": flavor,
        "os_version": name.split("-")[1],
        "rapid_deploy": True,
        "protection": {"delete": False},
        "deprecated": None,
        "deleted": None,
        "labels": {},
        "architecture": architecture,
    }
