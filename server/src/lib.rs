#![doc = include_str!("../README.md")]

pub mod app;
pub mod cli;
pub mod config;
pub mod postgres;
pub mod read;
pub mod rest;
pub mod secret;
pub mod shipped;
pub mod store;
pub mod telegram;
pub mod telemetry;
