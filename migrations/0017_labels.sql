-- What a worker has: it claims runs whose definition asks for no more.
alter table workers add column labels text[] not null default '{}';
