-- ARGV: id, unit, token, ttl ms -> nil if the lease is lost, else what is wanted.
local id, unit, token, ttl = unpack(ARGV)
if not holds(id, unit, token) then return nil end
redis.call('ZADD', P .. 'finetune_leases', now_ms() + tonumber(ttl), id .. '|' .. unit)
return unit == JOB and field(id, 'wanted') or 'run'
