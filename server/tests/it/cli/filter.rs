//! The filter of issue 3, word for word, on the command line and over REST; what looks like SQL stays a text.

use super::loopwright;
use crate::support::{Server, activity, problem, read};
use loopwright_engine::embedded::testing;
use serde_json::{Value, json};

/// The ids of a list.
fn ids(items: &Value) -> Vec<String> {
    items.as_array().unwrap().iter().map(|run| run["run_id"].as_str().unwrap().to_owned()).collect()
}

fn asked(filter: &str) -> String {
    let filter: String = url::form_urlencoded::byte_serialize(filter.as_bytes()).collect();
    format!("/v1/runs?where={filter}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_are_found_by_status_project_and_start() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    // Nobody works: each stays as it was started.
    let mut projects = Vec::new();
    for (user, name) in [("ann", "Greeter"), ("ann", "Counter"), ("bob", "Greeter")] {
        let body = json!({"name": name, "idea": "A program."});
        let (_, project) = read(server.post(user, "/v1/projects", &body).send().await.unwrap()).await;
        let project = project["id"].as_str().unwrap().to_owned();
        let started = server.trigger(user, &project, "respond-async").await;
        projects.push((project, crate::support::run_of(&started)));
    }
    let set = "update runs set status = 'running', started_at = '2026-11-25T10:30:00Z' where run_id = any($1::uuid[])";
    let runs: Vec<uuid::Uuid> = projects.iter().map(|(_, run)| run.parse().unwrap()).collect();
    sqlx::query(set).bind(&runs).execute(&server.pool).await.unwrap();
    let [(greeter, of_greeter), (_, of_counter), (_, of_bob)] = &projects[..] else { panic!("three") };

    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&server.pool);
    let by_command = |filter: &str| {
        let args = ["run", "list", "--json", "--where", filter];
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        assert!(output.status.success(), "{filter}: {output:?}");
        let mut found = ids(&serde_json::from_slice(&output.stdout).unwrap());
        found.sort();
        found
    };
    let by_rest = async |user: &str, filter: &str| {
        let request = server.get(user, &asked(filter));
        let (status, page) = read(request.send().await.unwrap()).await;
        assert_eq!(status, 200, "{filter}: {page}");
        let mut found = ids(&page["items"]);
        found.sort();
        found
    };
    let sorted = |runs: &[&String]| {
        let mut runs: Vec<String> = runs.iter().map(|run| (*run).clone()).collect();
        runs.sort();
        runs
    };
    let word_for_word = format!("status = 'running' and project = '{greeter}' and started_at > '2026-11-25'");
    for (filter, everybody, ann) in [
        (word_for_word.as_str(), vec![of_greeter], vec![of_greeter]),
        // A name is a name of everybody's for the operator, and of the caller's own for a user.
        ("project = 'Greeter'", vec![of_greeter, of_bob], vec![of_greeter]),
        ("project in ('Counter', 'Nothing')", vec![of_counter], vec![of_counter]),
        ("project != 'Greeter' and status = 'running'", vec![of_counter], vec![of_counter]),
        ("project = 'Greeter' and started_at > '2026-11-25T11:29+01:00'", vec![of_greeter, of_bob], vec![of_greeter]),
        ("project = 'Greeter' and started_at > '2026-11-25 11:30:00+01:00'", vec![], vec![]),
        ("started_at >= '2026-11-25T10:30:00Z' and project = 'Counter'", vec![of_counter], vec![of_counter]),
        ("started_at < '2026-11-25T10:30Z'", vec![], vec![]),
        // Texts, whatever they look like.
        ("project = ''' or 1=1 --'", vec![], vec![]),
        ("project = '''; drop table runs; --'", vec![], vec![]),
        ("project in ('x'') or (''1''=''1', '\" or true')", vec![], vec![]),
        ("workflow = 'dev-loop'' or ''''='''", vec![], vec![]),
        ("attributes.\"a'} or true --\" = '$1'", vec![], vec![]),
        ("workflow like '%'", vec![of_greeter, of_counter, of_bob], vec![of_greeter, of_counter]),
        ("workflow like '_ev-loop%'", vec![], vec![]),
    ] {
        assert_eq!(by_command(filter), sorted(&everybody), "{filter}");
        assert_eq!(by_rest("ann", filter).await, sorted(&ann), "{filter}");
    }
    // Whatever is asked, the caller sees nobody else's.
    let user: uuid::Uuid = sqlx::query_scalar("select user_id from projects where id = $1::uuid")
        .bind(greeter)
        .fetch_one(&server.pool)
        .await
        .unwrap();
    let hers = format!("user = '{user}'");
    assert_eq!(by_rest("bob", &hers).await, Vec::<String>::new());
    assert_eq!(by_rest("bob", "not status = 'failed'").await, sorted(&[of_bob]));
    assert_eq!(by_rest("ann", &hers).await, sorted(&[of_greeter, of_counter]));
    for (filter, says) in [
        ("projct = 'x'", "`project`"),
        ("status = 'running' or 1=1", "expected a field"),
        ("started_at > 'now()'", "not an instant"),
        ("project = 'x'; drop table runs", "no statements"),
    ] {
        let response = server.get("ann", &asked(filter)).send().await.unwrap();
        let body = problem(response, 400, "query_invalid").await;
        let detail = body["detail"].as_str().unwrap();
        assert!(detail.contains(says) && detail.contains("at column"), "{filter}: {body}");
    }
    let (status, _) = read(server.request(reqwest::Method::GET, "/v1/runs?where=x").send().await.unwrap()).await;
    assert_eq!(status, 401);
    server.stop().await;
}
