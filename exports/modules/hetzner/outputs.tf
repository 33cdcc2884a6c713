output "machines" {
  description = "Addresses of each machine."
  value = {
    for name, server in hcloud_server.this : name => {
      id   = server.id
      ipv4 = server.ipv4_address
      ipv6 = server.ipv6_address
    }
  }
}
