"""Architecture families: a checkpoint's config and tensor names become a plan, its weights an artifact."""
