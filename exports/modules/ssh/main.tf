# These hosts exist already. Terraform records them and runs nothing on them: `slum bootstrap` or `slum apply` installs
# the agent over SSH, where a host's key is checked and a failed step is taken up again.
resource "terraform_data" "host" {
  for_each = { for host in var.hosts : "${host.host}:${host.port}" => host }

  input = each.value
}
