mod fake_provider;
mod orchestrator;
mod provider;
