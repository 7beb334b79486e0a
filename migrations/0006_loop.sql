-- What the development loop has established about a project: facts that later steps read.
--
-- `requirements` (gather@1), `plan` (plan@1, extended by verify@1), `outcome` (commit@1: an item is done or blocked, with its
-- evidence), `verdict` (verify@1). Rows are only inserted; the newest of a kind is in force. `key` is the writing step's identity,
-- so that a step that is done again after a crash writes the same fact once.

create table project_records (
  n bigint generated always as identity primary key,
  project_id uuid not null references projects,
  kind text not null check (kind in ('requirements','plan','outcome','verdict')),
  key text not null,
  run_id uuid not null,
  body jsonb not null,
  created_at timestamptz not null default engine_now(),
  constraint project_records_key unique (project_id, kind, key)
);
create index project_records_newest on project_records (project_id, kind, n desc);
create trigger project_records_append_only before update or delete on project_records for each row execute function append_only();
