output "machines" {
  description = "App and private address of each machine."
  value = {
    for name, machine in fly_machine.this : name => {
      id         = machine.id
      app        = machine.app
      private_ip = machine.private_ip
    }
  }
}
