variable "fleet" {
  description = "Name of the fleet; part of every name and label."
  type        = string
}

variable "operator" {
  description = "Name of the operator in slum.toml."
  type        = string
}

variable "tenements" {
  description = "The machines of each tenement, its labels, and the ports that its router answers on."
  type = map(object({
    machines = list(string)
    labels   = map(string)
    ports    = list(number)
  }))
}

variable "location" {
  description = "Where the servers stand, e.g. fsn1."
  type        = string
}

variable "network_zone" {
  description = "Network zone of the location, when it is not a usual one."
  type        = string
  default     = null
}

variable "ip_range" {
  description = "Private network of the operator's machines."
  type        = string
  default     = "10.0.0.0/16"
}

variable "server_type" {
  description = "Size of the servers, e.g. cx23."
  type        = string
}

variable "image" {
  description = "Image of the servers."
  type        = string
}

variable "ssh_keys" {
  description = "Names of SSH keys that the project has."
  type        = list(string)
}

variable "ssh_public_keys" {
  description = "SSH keys to add: name to public key."
  type        = map(string)
}

variable "admin_cidrs" {
  description = "Networks that may use SSH."
  type        = list(string)
}

variable "slum_server" {
  description = "URL of the control plane that the machines join."
  type        = string
}

variable "slum_version" {
  description = "Version of slum to install."
  type        = string
}

variable "join_tokens" {
  description = "A join token for each machine."
  type        = map(string)
  sensitive   = true
}
