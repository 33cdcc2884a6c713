output "hosts" {
  description = "The hosts as slum bootstrap takes them."
  value       = [for host in terraform_data.host : "${host.output.user}@${host.output.host}:${host.output.port}"]
}

output "access" {
  description = "How they are reached."
  value       = var.access
}
