variable "fleet" {
  description = "Name of the fleet; part of every app's name."
  type        = string
}

variable "tenements" {
  description = "The machines of each tenement, its labels, and the port that its router answers on."
  type = map(object({
    machines = list(string)
    labels   = map(string)
    port     = number
  }))
}

variable "org" {
  description = "Slug of the organisation."
  type        = string
}

variable "region" {
  description = "Where the machines run, e.g. iad."
  type        = string
}

variable "image" {
  description = "Image with slum inside."
  type        = string
}

variable "cpu_kind" {
  description = "shared or performance."
  type        = string
}

variable "cpus" {
  description = "CPUs of a machine."
  type        = number
}

variable "memory_mb" {
  description = "Memory of a machine."
  type        = number
}

variable "volume_gb" {
  description = "Size of a machine's volume."
  type        = number
}

variable "slum_server" {
  description = "URL of the control plane that the machines join."
  type        = string
}

variable "join_tokens" {
  description = "A join token for each machine."
  type        = map(string)
  sensitive   = true
}
