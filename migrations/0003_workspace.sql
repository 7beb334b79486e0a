-- Repositories. Git objects travel as bundles; a worktree on disk is a cache that any worker rebuilds from here.
--
-- `project_refs` says where branch `main` of a project stands; it moves by compare-and-set, in the transaction that stores the
-- bundle of the new commit and the versions of its files. A bundle with a `base` needs the objects of that commit.

create table project_refs (
  project_id uuid not null,
  name text not null,
  oid text not null check (oid ~ '^[0-9a-f]{40}$'),
  moved_at timestamptz not null default engine_now(),
  primary key (project_id, name)
);

create table project_bundles (
  id bigint generated always as identity primary key,
  project_id uuid not null,
  oid text not null check (oid ~ '^[0-9a-f]{40}$'),
  base text,
  bundle bytea not null,
  created_at timestamptz not null default engine_now(),
  constraint project_bundles_oid_key unique (project_id, oid)
);
