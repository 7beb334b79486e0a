//! Every command has a test that gives it to the real binary.

use clap::CommandFactory;
use loopwright_server::cli::Cli;
use std::{collections::BTreeMap, fs, path::Path};

/// Commands by what is typed, and a test that types them. A command without a line here has no test.
const TESTED: &[(&str, &str)] = &[
    ("api-keys add", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys disable", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys enable", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys list", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys revoke", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys rewrap", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("api-keys test", "a_key_of_the_platform_is_added_tested_and_rotated_from_the_command_line"),
    ("bench", "the_bench_measures_with_workers_that_are_this_program"),
    ("chaos", "half_a_minute_of_faults_breaks_no_promise"),
    ("completion", "keys_completions_and_stopped_holds_have_their_commands"),
    ("credits adjust", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits audit", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits balance", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits findings", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits grant", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits ledger", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits refund", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits release", "keys_completions_and_stopped_holds_have_their_commands"),
    ("credits report", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("credits resolve", "credits_go_to_the_developer_unless_somebody_is_named"),
    ("demo", "the_demo_ends_the_same_whether_its_worker_is_killed_or_not"),
    ("dev", "dev_serves_and_works_until_it_is_interrupted"),
    ("doctor", "the_command_line_works_on_a_configured_database"),
    ("index build", "the_index_of_a_folder_is_kept_in_the_data_folder"),
    ("index map", "the_index_of_a_folder_is_kept_in_the_data_folder"),
    ("index pack", "the_index_of_a_folder_is_kept_in_the_data_folder"),
    ("index search", "the_index_of_a_folder_is_kept_in_the_data_folder"),
    ("index symbols", "the_index_of_a_folder_is_kept_in_the_data_folder"),
    ("keys generate", "keys_completions_and_stopped_holds_have_their_commands"),
    ("keys list", "keys_completions_and_stopped_holds_have_their_commands"),
    ("keys reseal", "what_runs_store_is_sealed_anew_by_the_owner_and_the_application_is_told_so"),
    ("migrate", "the_command_line_works_on_a_configured_database"),
    ("pricing import", "a_price_list_is_taken_over_as_a_whole_or_not_at_all"),
    ("pricing list", "a_price_list_is_taken_over_as_a_whole_or_not_at_all"),
    ("pricing sync", "a_price_list_is_taken_over_as_a_whole_or_not_at_all"),
    ("project cap", "a_projects_cap_is_set_and_lifted"),
    ("project list", "the_command_line_works_on_a_configured_database"),
    ("project new", "the_command_line_works_on_a_configured_database"),
    ("project show", "the_command_line_works_on_a_configured_database"),
    ("retention import", "an_old_run_goes_into_a_file_and_comes_back_to_be_read"),
    ("retention list", "an_old_run_goes_into_a_file_and_comes_back_to_be_read"),
    ("retention run", "an_old_run_goes_into_a_file_and_comes_back_to_be_read"),
    ("run approve", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run cancel", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run export", "a_run_is_paused_forked_exported_and_decided_again_from_the_command_line"),
    ("run forecast", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run fork", "a_fork_under_another_definition_has_the_inputs_that_it_declares"),
    ("run history", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run import", "a_run_is_paused_forked_exported_and_decided_again_from_the_command_line"),
    ("run limit", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run list", "runs_are_found_by_status_project_and_start"),
    ("run migrate", "many_runs_are_migrated_in_pages_and_each_has_its_verdict"),
    ("run pause", "a_run_is_paused_forked_exported_and_decided_again_from_the_command_line"),
    ("run query", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run replay", "a_run_is_paused_forked_exported_and_decided_again_from_the_command_line"),
    ("run reset", "a_run_is_paused_forked_exported_and_decided_again_from_the_command_line"),
    ("run resume", "many_runs_go_on_in_pages_and_each_has_its_verdict"),
    ("run show", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run signal", "a_start_says_its_terms_and_a_signal_with_an_id_arrives_once"),
    ("run start", "a_start_says_its_terms_and_a_signal_with_an_id_arrives_once"),
    ("run terminate", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run update", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("run watch", "a_run_is_watched_asked_answered_and_ended_from_the_command_line"),
    ("schedule backfill", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule create", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule delete", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule list", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule pause", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule resume", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule show", "an_operator_makes_watches_and_stops_a_schedule"),
    ("schedule trigger", "an_operator_makes_watches_and_stops_a_schedule"),
    ("server", "what_the_machine_lacks_is_exit_code_3"),
    ("token", "the_development_secret_is_made_once_and_private"),
    ("worker", "what_the_machine_lacks_is_exit_code_3"),
    ("workflow deploy", "what_is_deployed_has_its_prompts_and_no_error"),
    ("workflow graph", "definitions_are_checked_and_drawn_without_a_database"),
    ("workflow lint", "definitions_are_checked_and_drawn_without_a_database"),
    ("workflow migrate", "many_runs_are_migrated_in_pages_and_each_has_its_verdict"),
    ("workflow versions", "what_is_deployed_has_its_prompts_and_no_error"),
];

/// Commands without commands below them.
fn leaves(command: &clap::Command, path: &str, found: &mut Vec<String>) {
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        let path = format!("{path} {}", below.get_name()).trim_start().to_owned();
        if below.has_subcommands() {
            leaves(below, &path, found);
        } else {
            found.push(path);
        }
    }
}

/// Bodies of all tests, by name, with the file they are in.
fn tests(folder: &Path, found: &mut BTreeMap<String, (String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for (at, _) in text.match_indices("fn ") {
            let name: String = text[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let body = text[at..].split("\n}\n").next().unwrap_or_default();
            let before = text[..at].trim_end().trim_end_matches("async").trim_end();
            if before.ends_with(']') && before.rsplit('\n').next().is_some_and(|line| line.contains("test")) {
                found.insert(name, (body.to_owned(), text.clone()));
            }
        }
    }
}

#[test]
fn every_command_is_typed_by_a_test() {
    let mut commands = Vec::new();
    leaves(&Cli::command(), "", &mut commands);
    commands.sort();
    let listed: Vec<String> = TESTED.iter().map(|(command, _)| (*command).to_owned()).collect();
    assert_eq!(listed, commands, "commands that no test names, or that are gone");
    let mut found = BTreeMap::new();
    tests(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it"), &mut found);
    let mut problems = Vec::new();
    for (command, test) in TESTED {
        let Some((body, file)) = found.get(*test) else {
            problems.push(format!("{command}: there is no test {test}"));
            continue;
        };
        // The last word stands in the test; what comes before it, and the only one, may be in a helper of its file.
        let words: Vec<String> = command.split(' ').map(|word| format!("\"{word}\"")).collect();
        let last = words.len() == 1 || body.contains(&words[words.len() - 1]);
        if !last || !words.iter().all(|word| file.contains(word)) {
            problems.push(format!("{command}: {test} does not type it"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
