terraform {
  required_version = ">= 1.11"

  required_providers {
    fly = {
      source  = "stategraph/fly"
      version = "~> 0.2"
    }
  }
}
