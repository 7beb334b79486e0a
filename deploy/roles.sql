-- Two roles: the owner migrates and retires old runs; `loopwright_app` serves and works, and cannot rewrite what is append-only.
--
-- Run it as the owner of the tables (who may create roles the first time), in a migrated database, and again after every `migrate`:
--
--   psql "$OWNER_DATABASE_URL" -v ON_ERROR_STOP=1 -f deploy/roles.sql
--
-- `loopwright_app` cannot log in. Give it to a role that can, once; its password stands nowhere here:
--
--   create role loopwright_worker login password '…' in role loopwright_app;
--
-- `server` and `worker` get that one's address, `migrate`, `retention` and `keys reseal` (which seals history anew) the owner's:
-- RUNBOOK.md, "Roles". A new table is out of reach of the application until this has been run, so that nothing append-only is ever open.

do $$ begin
  create role loopwright_app nologin;
exception when duplicate_object or unique_violation then null;  -- there, or made by somebody else just now
end $$;

begin;
grant usage on schema public to loopwright_app;
-- From the beginning each time, so that this file alone says what is granted. None has `truncate`, `references` or `trigger`.
revoke all on all tables in schema public from public, loopwright_app;
grant select, insert, update, delete on all tables in schema public to loopwright_app;
grant usage on all sequences in schema public to loopwright_app;

-- Append-only: whatever the owner has guarded by the trigger (the ledger, prices, refund rules, limits, records of projects), and
-- the history of runs, which has none because retention takes whole months of it away.
do $$
declare guarded regclass;
begin
  for guarded in
    select distinct t.tgrelid::regclass from pg_trigger t join pg_proc p on p.oid = t.tgfoid
    where p.proname = 'append_only' and p.pronamespace = 'public'::regnamespace
    union select 'history'::regclass
  loop
    execute format('revoke update, delete on %s from loopwright_app', guarded);
  end loop;
  -- Rows of a partition are written through their table, which says what may be done.
  for guarded in select inhrelid::regclass from pg_inherits where inhparent = 'history'::regclass loop
    execute format('revoke insert, update, delete on %s from loopwright_app', guarded);
  end loop;
end $$;

-- Which migrations were applied, and which archives there are, is the owner's to say.
revoke insert, update, delete on _sqlx_migrations, archives, archived_runs from loopwright_app;
commit;
