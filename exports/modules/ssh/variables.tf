variable "hosts" {
  description = "Hosts that are reached over SSH."
  type = list(object({
    host        = string
    port        = number
    user        = string
    labels      = map(string)
    fingerprint = optional(string)
  }))
}

variable "tenements" {
  description = "How many machines each tenement takes of the hosts."
  type        = map(number)

  validation {
    condition     = sum(concat([0], values(var.tenements))) <= length(var.hosts)
    error_message = "The tenements need more machines than there are hosts."
  }
}

variable "access" {
  description = "How the hosts are reached: paths and names only."
  type = object({
    key              = optional(string)
    jump             = optional(string)
    jump_fingerprint = optional(string)
    host_key         = string
    known_hosts      = optional(string)
  })
}
