locals {
  zones = {
    fsn1 = "eu-central"
    nbg1 = "eu-central"
    hel1 = "eu-central"
    ash  = "us-east"
    hil  = "us-west"
    sin  = "ap-southeast"
  }

  # A spread group holds at most ten servers.
  machines = merge([
    for tenement, wanted in var.tenements : {
      for index, machine in wanted.machines : machine => {
        tenement = tenement
        group    = length(wanted.machines) > 1 ? "${tenement}-${floor(index / 10) + 1}" : null
        labels   = wanted.labels
      }
    }
  ]...)
  groups = toset([for machine in local.machines : machine.group if machine.group != null])
  labels = { slum-fleet = var.fleet }
}

resource "hcloud_ssh_key" "this" {
  for_each = var.ssh_public_keys

  name       = each.key
  public_key = each.value
  labels     = local.labels
}

resource "hcloud_network" "this" {
  name     = "${var.fleet}-${var.operator}"
  ip_range = var.ip_range
  labels   = local.labels
}

resource "hcloud_network_subnet" "this" {
  network_id   = hcloud_network.this.id
  type         = "cloud"
  network_zone = coalesce(var.network_zone, lookup(local.zones, var.location, "eu-central"))
  ip_range     = var.ip_range
}

# The agent dials out, so nothing comes in but requests, and SSH for those who ask for it.
resource "hcloud_firewall" "this" {
  for_each = var.tenements

  name   = "${var.fleet}-${each.key}"
  labels = merge(local.labels, { slum-tenement = each.key })

  rule {
    description = "ping"
    direction   = "in"
    protocol    = "icmp"
    source_ips  = ["0.0.0.0/0", "::/0"]
  }

  dynamic "rule" {
    for_each = toset([for port in each.value.ports : tostring(port)])

    content {
      description = "requests"
      direction   = "in"
      protocol    = "tcp"
      port        = rule.value
      source_ips  = ["0.0.0.0/0", "::/0"]
    }
  }

  dynamic "rule" {
    for_each = length(var.admin_cidrs) > 0 ? ["22"] : []

    content {
      description = "ssh"
      direction   = "in"
      protocol    = "tcp"
      port        = rule.value
      source_ips  = var.admin_cidrs
    }
  }
}

resource "hcloud_placement_group" "this" {
  for_each = local.groups

  name   = "${var.fleet}-${each.key}"
  type   = "spread"
  labels = local.labels
}

resource "hcloud_server" "this" {
  for_each = local.machines

  name               = "${var.fleet}-${each.key}"
  server_type        = var.server_type
  image              = var.image
  location           = var.location
  ssh_keys           = distinct(concat(var.ssh_keys, [for key in hcloud_ssh_key.this : key.name]))
  firewall_ids       = [hcloud_firewall.this[each.value.tenement].id]
  placement_group_id = each.value.group == null ? null : hcloud_placement_group.this[each.value.group].id
  labels             = merge(each.value.labels, local.labels, { slum-tenement = each.value.tenement, slum-machine = each.key })

  user_data = templatefile("${path.module}/cloud-init.yaml.tftpl", {
    server  = var.slum_server
    version = var.slum_version
    machine = each.key
    token   = lookup(var.join_tokens, each.key, "")
  })

  public_net {
    ipv4_enabled = true
    ipv6_enabled = true
  }

  network {
    network_id = hcloud_network.this.id
    alias_ips  = []
  }

  # A server without its subnet cannot be attached to the network.
  depends_on = [hcloud_network_subnet.this]

  lifecycle {
    # Both are read at the first boot only; a new token must not replace a machine with its data.
    ignore_changes = [user_data, ssh_keys]
  }
}
