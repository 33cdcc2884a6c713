# One app a machine: a join token is for one machine, and an app's secrets are for all of its machines.
locals {
  machines = merge([
    for tenement, wanted in var.tenements : {
      for machine in wanted.machines : machine => {
        tenement = tenement
        labels   = wanted.labels
        port     = wanted.port
      }
    }
  ]...)
}

resource "fly_app" "this" {
  for_each = local.machines

  name     = "${var.fleet}-${each.key}"
  org_slug = var.org
}

resource "fly_volume" "this" {
  for_each = local.machines

  app     = fly_app.this[each.key].name
  name    = "slum"
  region  = var.region
  size_gb = var.volume_gb
}

resource "fly_secret" "join_token" {
  for_each = local.machines

  app   = fly_app.this[each.key].name
  key   = "SLUM_JOIN_TOKEN"
  value = lookup(var.join_tokens, each.key, "")
}

resource "fly_machine" "this" {
  for_each = local.machines

  app    = fly_app.this[each.key].name
  name   = each.key
  region = var.region
  image  = var.image

  metadata = merge(each.value.labels, {
    slum_fleet    = var.fleet
    slum_tenement = each.value.tenement
  })

  env = {
    SLUM_SERVER  = var.slum_server
    SLUM_MACHINE = each.key
  }

  guest {
    cpu_kind  = var.cpu_kind
    cpus      = var.cpus
    memory_mb = var.memory_mb
  }

  mount {
    volume = fly_volume.this[each.key].id
    path   = "/var/lib/slum"
  }

  restart {
    policy = "always"
  }

  dynamic "service" {
    for_each = each.value.port == null ? [] : [each.value.port]

    content {
      protocol             = "tcp"
      internal_port        = service.value
      autostart            = true
      autostop             = false
      min_machines_running = 1

      port {
        port     = 80
        handlers = ["http"]
      }

      port {
        port     = 443
        handlers = ["tls", "http"]
      }
    }
  }

  depends_on = [fly_secret.join_token]
}

resource "fly_ip_address" "v6" {
  for_each = { for name, machine in local.machines : name => machine if machine.port != null }

  app  = fly_app.this[each.key].name
  type = "v6"
}

resource "fly_ip_address" "v4" {
  for_each = { for name, machine in local.machines : name => machine if machine.port != null }

  app  = fly_app.this[each.key].name
  type = "shared_v4"
}
